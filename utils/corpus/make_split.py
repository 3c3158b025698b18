"""Divide a database into a training and a validation list.

    python utils/corpus/make_split.py AUDIO OUT --validation 0.1
    python utils/corpus/make_split.py AUDIO OUT --by speaker

Writes OUT/train.txt and OUT/val.txt, for --pathTrain and --pathVal: a name a line, that of the file
without folder and extension. By utterance, speakers with two or more are in both lists, as probes
of the speaker need it; by speaker, no speaker is in both, which shows how a model does on voices it
never heard. The same seed gives the same lists, and new speakers leave those of the others as they
were, unless it goes by speaker. Lists that are there already and differ are replaced only with
--force, since an experiment may rest on them.
"""

import argparse
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from utils.data.corpus import read_utterance_list
from utils.data.listing import find_files
from utils.files import refuse_to_replace, write_lines
from utils.misc import UserError, first_few, seed_from
from utils.run.command import CommandLine, command

TRAIN, VALIDATION = "train.txt", "val.txt"


@command
def main(argv=None):
    args = parse_arguments(argv)
    speakers = names_by_speaker(args)
    split = split_utterances if args.by == "utterance" else split_speakers
    train, validation = split(speakers, args.validation, args.seed)
    if not validation or not train:
        raise UserError(
            f"{args.pathDB}: {sum(map(len, speakers.values()))} utterances of {len(speakers)} "
            f"speakers can't be divided by {args.by}: one list would be empty"
        )
    lists = {os.path.join(args.out, TRAIN): train, os.path.join(args.out, VALIDATION): validation}
    lists = {path: sorted(names) for path, names in lists.items()}
    if not args.force:
        for path, names in lists.items():
            refuse_to_replace(path, names, "names")
    for path, names in lists.items():
        write_list(path, names)
        print(f"{len(names)} utterances: {path}")


def parse_arguments(argv):
    parser = CommandLine(
        prog="make_split.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("pathDB", help="root of the audio files, speaker/.../name + extension")
    add("out", help=f"folder to write {TRAIN} and {VALIDATION} to")
    add(
        "--file_extension",
        default=".flac",
        metavar="EXT",
        help="end of the audio files' names (default: .flac)",
    )
    add(
        "--by",
        choices=["utterance", "speaker"],
        default="utterance",
        help="hold out utterances of each speaker, or whole speakers (default: utterance)",
    )
    add(
        "--validation",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the utterances to hold out (default: 0.1)",
    )
    add("--seed", type=int, default=0, help="of what is held out (default: 0)")
    add(
        "--list",
        metavar="FILE",
        help="divide only the names in this list, a name a line (default: all)",
    )
    add(
        "--speaker_level",
        type=int,
        default=1,
        metavar="N",
        help="how many of a file's folders name its speaker (default: 1, the first)",
    )
    add("--force", action="store_true", help="replace lists that are there already")
    args = parser.parse_args(argv)
    if not 0 < args.validation < 1:
        parser.error(f"--validation {args.validation}: a share between 0 and 1")
    if args.speaker_level < 1 and args.by == "speaker":
        parser.error("--speaker_level 0: all files have one speaker; use --by utterance")
    if not os.path.isdir(args.pathDB):
        raise UserError(f"{args.pathDB}: no such directory")
    return args


def names_by_speaker(args):
    """The names of each speaker: speaker -> list, both sorted. Says which of --list are missing."""
    listed = set(read_utterance_list(args.list)) if args.list else None
    paths, speakers = {}, {}
    for path in find_files(args.pathDB, args.file_extension):
        *folders, file = path.split("/")
        name = file[: -len(args.file_extension) or None]
        if listed is not None and name not in listed:
            continue
        if name in paths:
            raise UserError(
                f"{args.pathDB}: {paths[name]} and {path} have one name, by which lists go: "
                "rename one"
            )
        paths[name] = path
        speakers.setdefault("/".join(folders[: args.speaker_level]), []).append(name)
    missing = sorted((listed or set()) - paths.keys())
    if missing:
        print(f"{args.list}: {len(missing)} names aren't in {args.pathDB}: {first_few(missing)}")
    return {speaker: sorted(names) for speaker, names in sorted(speakers.items())}


def split_utterances(speakers, share, seed):
    """Hold out a share of each speaker's names, at least one of two: (train, validation)."""
    train, validation = [], []
    for speaker, names in speakers.items():
        names = shuffled(names, seed, speaker)
        n_held = min(max(1, round(share * len(names))), len(names) - 1)
        validation += names[:n_held]
        train += names[n_held:]
    return train, validation


def split_speakers(speakers, share, seed):
    """Hold out speakers, at least one, to come near a share of all names: (train, validation)."""
    wanted = share * sum(map(len, speakers.values()))
    train, validation = [], []
    for speaker in shuffled(speakers, seed, "speakers"):
        names = speakers[speaker]
        nearer = abs(len(validation) + len(names) - wanted) < abs(len(validation) - wanted)
        (validation if nearer else train).extend(names)
    if not validation:  # every speaker has far more than the share
        validation = min(speakers.values(), key=len)
        train = [name for name in train if name not in set(validation)]
    return train, validation


def shuffled(items, *seed):
    items = list(items)
    random.Random(seed_from(*seed)).shuffle(items)
    return items


def write_list(path, names):
    try:
        write_lines(path, names)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from error


if __name__ == "__main__":
    main()
