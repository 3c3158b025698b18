"""Split a corpus into a training and a validation list.

    python utils/corpus/make_split.py AUDIO OUT --validation 0.1
    python utils/corpus/make_split.py AUDIO OUT --by speaker

Writes OUT/train.txt and OUT/val.txt, for --pathTrain and --pathVal, with one file name per line,
without extension, and with folders only if other files have its name. By utterance, speakers with
at least two utterances are in both lists, as speaker probes need; by speaker, no speaker is in
both, to test a model on unseen voices. The same seed gives the same lists; by utterance, adding
speakers doesn't change the split of the others. Existing lists that differ are replaced only with
--force, since an experiment may depend on them.
"""

import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import utils.run.before_torch  # noqa: F401

from utils.data.corpus import Corpus, Utterance, read_utterance_list, warn_of_speakers
from utils.data.listing import choose_extension
from utils.data.names import files_by_key, files_by_shortest_key
from utils.files import refuse_to_replace, write_lines, writing_to
from utils.misc import UserError, first_few, seed_from
from utils.run.command import CommandLine, command
from utils.run.shared_flags import add_extension

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
            f"speakers can't be split by {args.by}: one list would be empty"
        )
    lists = {os.path.join(args.out, TRAIN): train, os.path.join(args.out, VALIDATION): validation}
    lists = {path: sorted(names) for path, names in lists.items()}
    if not args.force:
        for path, names in lists.items():
            refuse_to_replace(path, names, "names")
    for path, names in lists.items():
        with writing_to(path):
            write_lines(path, names)
        print(f"{len(names)} utterances: {path}")


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="make_split.py", description=__doc__)
    add = parser.add_argument
    add("pathDB", help="root of the audio files, speaker/.../name + extension")
    add("out", help=f"folder to write {TRAIN} and {VALIDATION} to")
    add_extension(add)
    add("--by", choices=["utterance", "speaker"], default="utterance",
        help="hold out utterances of each speaker, or whole speakers")
    add("--validation", type=float, default=0.1, metavar="FRACTION",
        help="fraction of the utterances to hold out")
    add("--seed", type=int, default=0, help="of the random choice")
    add("--list", metavar="FILE", help="split only the names in this list, one per line (default: "
        "all)")
    add("--speaker_level", type=int, default=1, metavar="N",
        help="number of leading folders that name a file's speaker")
    add("--force", action="store_true", help="replace existing lists")
    return parser


# fmt: on


def parse_arguments(argv):
    args = build_parser().parse_args(argv)
    if not 0 < args.validation < 1:
        raise UserError(f"--validation {args.validation}: must be between 0 and 1")
    if args.speaker_level < 1 and args.by == "speaker":
        raise UserError("--speaker_level 0: all files have one speaker; use --by utterance")
    if not os.path.isdir(args.pathDB):
        raise UserError(f"{args.pathDB}: no such directory")
    args.file_extension = choose_extension(args.pathDB, args.file_extension)
    return args


def names_by_speaker(args):
    """Speaker -> names, both sorted; prints which names of --list are missing."""
    listed = set(read_utterance_list(args.list)) if args.list else None
    speakers = {}
    if listed is None:
        paths = files_by_shortest_key(args.pathDB, args.file_extension)
    else:
        paths = files_by_key(args.pathDB, args.file_extension, listed, args.list)
    for name, path in paths.items():
        folders = path.split("/")[:-1]
        speakers.setdefault("/".join(folders[: args.speaker_level]), []).append(name)
    if args.speaker_level:
        utterances = tuple(Utterance(0, path, samples=0) for path in paths.values())
        warn_of_speakers(Corpus(args.pathDB, utterances, tuple(sorted(speakers))))
    missing = sorted((listed or set()) - paths.keys())
    if missing:
        print(f"{args.list}: {len(missing)} names aren't in {args.pathDB}: {first_few(missing)}")
    return {speaker: sorted(names) for speaker, names in sorted(speakers.items())}


def split_utterances(speakers, fraction, seed):
    """Hold out a fraction of each speaker's names, at least one of two: (train, validation)."""
    train, validation = [], []
    for speaker, names in speakers.items():
        names = shuffled(names, seed, speaker)
        n_held = min(max(1, round(fraction * len(names))), len(names) - 1)
        validation += names[:n_held]
        train += names[n_held:]
    return train, validation


def split_speakers(speakers, fraction, seed):
    """Hold out at least one speaker, for about a fraction of all names: (train, validation)."""
    wanted = fraction * sum(map(len, speakers.values()))
    train, validation = [], []
    for speaker in shuffled(speakers, seed, "speakers"):
        names = speakers[speaker]
        nearer = abs(len(validation) + len(names) - wanted) < abs(len(validation) - wanted)
        (validation if nearer else train).extend(names)
    if not validation:  # every speaker has far more than the fraction
        validation = min(speakers.values(), key=len)
        train = [name for name in train if name not in set(validation)]
    return train, validation


def shuffled(items, *seed):
    items = list(items)
    random.Random(seed_from(*seed)).shuffle(items)
    return items


if __name__ == "__main__":
    main()
