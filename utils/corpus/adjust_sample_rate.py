"""Convert audio files to 16 kHz.

    python utils/corpus/adjust_sample_rate.py AUDIO OUT --file_extension .mp3 --out_extension .flac
    python utils/corpus/adjust_sample_rate.py AUDIO LABELS.txt OUT --file_extension .mp3

Converts every file below AUDIO, at any rate and in any format that libsndfile reads (WAV, FLAC,
Ogg, Opus, MP3 and more), to 16-bit files in the same folders below OUT. With LABELS.txt, only files
whose name without extension is the first word of one of its lines. Files that exist already aren't
converted again, so repeating an interrupted call resumes it. Unreadable files are listed at the
end; the exit status is then 2.
"""

import os
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import numpy as np
import soundfile
import torch

from utils.data.audio import open_audio, read_header, reason
from utils.data.labels import read_text
from utils.data.listing import find_files
from utils.data.names import keys_of, name_of
from utils.data.workers import Workers
from utils.files import atomic_path, remove_leftovers
from utils.misc import SAMPLE_RATE, UserError, first_few
from utils.run.command import CommandLine, at_least, command, extension
from utils.run.shared_flags import add_extension

BLOCK, MARGIN = 60, 1  # seconds resampled at once, and additional ones at both ends
CONVERTED, EXISTING = "converted", "exists already"


@command
def main(argv=None):
    args = parse_arguments(argv)
    from utils.torchaudio_import import torchaudio  # takes a second to import

    def convert(path):
        return path, convert_file(args, path, torchaudio.functional.resample)

    torch.set_num_threads(1)  # files in parallel are faster than threads on each
    paths = chosen_files(args)
    for folder in {os.path.dirname(target_of(args, path)) for path in paths}:
        remove_leftovers(folder)
    results = Workers(convert, paths, args.n_threads).results("converting", " files")
    outcomes = [outcome for _, outcome in results]
    n_converted, n_existing = outcomes.count(CONVERTED), outcomes.count(EXISTING)
    print(f"{n_converted} files converted, {n_existing} existed already: {args.path_out}")
    failures = [
        f"{path}: {outcome}" for path, outcome in results if outcome not in (CONVERTED, EXISTING)
    ]
    if failures:
        raise UserError(
            f"{len(failures)} of {len(paths)} files can't be converted: {first_few(failures, 20)}"
        )


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="adjust_sample_rate.py", description=__doc__)
    add = parser.add_argument
    add("path_db", help="folder of the audio files; subfolders are included")
    add("path_phone_files", nargs="?", help="convert only the files listed here, for example in "
        "phone labels: the first word of each line is a name without extension")
    add("path_out", help="folder to write to")
    add("--out_sample_rate", type=at_least(1), default=SAMPLE_RATE, metavar="HZ",
        help="of the new files (default: 16000)")
    add_extension(add, ".mp3")
    add("--out_extension", type=extension, metavar="EXT",
        help="of the new files, which also sets their format "
        "(default: that of the old ones); .flac is lossless, .mp3 compresses a second time")
    add("--n_threads", type=int, default=os.cpu_count(), metavar="N",
        help="files converted in parallel (default: one per processor)")
    return parser


# fmt: on


def parse_arguments(argv):
    args = build_parser().parse_intermixed_args(argv)
    args.out_extension = args.out_extension or args.file_extension
    if format_of("file" + args.out_extension) not in soundfile.available_formats():
        raise UserError(
            f"--out_extension {args.out_extension}: not a format that can be written; "
            "try .flac or .wav"
        )
    if not os.path.isdir(args.path_db):
        raise UserError(f"{args.path_db}: no such directory")
    inside = os.path.commonpath([os.path.realpath(args.path_db), os.path.realpath(args.path_out)])
    if inside == os.path.realpath(args.path_db):
        raise UserError(f"{args.path_out}: is inside {args.path_db}; name another folder")
    return args


def chosen_files(args):
    """Paths below `path_db` of the files to convert; prints which listed files are missing."""
    paths = find_files(args.path_db, args.file_extension)
    if args.path_phone_files is None:
        return paths
    lines = read_text(args.path_phone_files).splitlines()
    wanted = {line.split()[0] for line in lines if line.strip()}
    keys = {path: keys_of(path, name_of(path, args.file_extension)) for path in paths}
    chosen = [path for path in paths if not wanted.isdisjoint(keys[path])]
    missing = sorted(wanted.difference(*keys.values()))
    if missing:
        print(
            f"{args.path_phone_files}: {len(missing)} of {len(wanted)} names have no file in "
            f"{args.path_db}: {first_few(missing)}"
        )
    if not chosen:
        raise UserError(f"{args.path_db}: none of its files is named in {args.path_phone_files}")
    return chosen


def target_of(args, path):
    stem = path[: -len(args.file_extension) or None]
    return os.path.join(args.path_out, stem + args.out_extension)


def convert_file(args, path, resample):
    """Convert one file. Returns CONVERTED, EXISTING or the reason it can't be converted."""
    source, target = os.path.join(args.path_db, path), target_of(args, path)
    try:
        if is_converted(source, target, args.out_sample_rate):
            return EXISTING
        with open_audio(source) as audio:
            if audio.frames == 0:
                return "empty"
            same_format = args.out_extension == args.file_extension
            with atomic_path(target) as temporary:
                if same_format and audio.samplerate == args.out_sample_rate:
                    shutil.copyfile(source, temporary)
                else:
                    write_audio(temporary, audio, args.out_sample_rate, resample)
    except (OSError, soundfile.SoundFileError) as error:
        return reason(error)
    return CONVERTED


def is_converted(source, target, rate):
    """Whether `target` exists, with this rate, and is no older than `source`."""
    if not os.path.exists(target) or os.path.getmtime(target) < os.path.getmtime(source):
        return False
    header = read_header(target)
    return header.rate == rate and not header.problem


def write_audio(path, audio, rate, resample):
    """Write the open file `audio` at `rate` Hz, with 16 bits if the format supports them."""
    format_ = format_of(path)
    subtype = "PCM_16" if soundfile.check_format(format_, "PCM_16") else None
    with soundfile.SoundFile(path, "w", rate, audio.channels, subtype, format=format_) as new:
        for block in resampled_blocks(audio, rate, resample):
            new.write(block.clip(-1, 1))


def format_of(path):
    """soundfile's name of the format with this extension."""
    return os.path.splitext(path)[1][1:].upper()


def resampled_blocks(audio, rate, resample):
    """The rest of the open file `audio` at `rate` Hz, in arrays (n, channels) float32.

    Blocks of whole seconds begin at whole samples at both rates, and each is resampled together
    with a margin that is cut off: the result is the same as resampling the whole file at once.
    """
    old = audio.samplerate
    samples, before = audio.read((BLOCK + MARGIN) * old, dtype="float32", always_2d=True), 0
    while True:
        following = audio.read(BLOCK * old, dtype="float32", always_2d=True)
        block = resample(torch.from_numpy(samples.T.copy()), old, rate).T.numpy()
        if len(following) == 0:
            yield block[before * rate :]
            return
        yield block[before * rate : (before + BLOCK) * rate]
        samples = np.concatenate([samples[(before + BLOCK - MARGIN) * old :], following])
        before = MARGIN


if __name__ == "__main__":
    main()
