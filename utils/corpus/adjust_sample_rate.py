"""Convert audio files to 16 kHz.

    python utils/corpus/adjust_sample_rate.py AUDIO OUT --file_extension .mp3 --out_extension .flac
    python utils/corpus/adjust_sample_rate.py AUDIO LABELS.txt OUT --file_extension .mp3

Converts every file below AUDIO, at any rate and in any format that libsndfile reads (WAV, FLAC,
Ogg, Opus, MP3 and more), to 16-bit files in the same folders below OUT. With LABELS.txt, only files
whose name without extension is the first word of one of its lines. Files that exist already aren't
converted again, so repeating an interrupted call resumes it. Unreadable files are listed at the
end; the exit status is then 2. Samples beyond [-1, 1], which 16 bits can't hold, are clipped and
counted; files that consist of them are refused.
"""

import math
import os
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import utils.run.before_torch  # noqa: F401

import numpy as np
import soundfile
import torch
from numpy.lib.stride_tricks import sliding_window_view

from utils.data.audio import MOST_BEYOND, TOO_LOUD, open_audio, read_header, reason
from utils.data.labels import read_text
from utils.data.listing import find_files
from utils.data.names import keys_of, name_of
from utils.data.workers import Workers
from utils.files import atomic_path, remove_leftovers
from utils.misc import SAMPLE_RATE, UserError, counted, first_few
from utils.run.command import CommandLine, at_least, command, extension
from utils.run.machine import n_processors
from utils.run.shared_flags import add_extension

BLOCK, MARGIN = 60, 1  # seconds resampled at once, and additional ones at both ends
CONVERTED, EXISTING = DONE = ("converted", "exists already")
LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000  # Hz; what a header claims beyond is no audio
LARGEST_KERNEL = 2**20  # numbers in torchaudio's table; between usual rates it has up to 2**19


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
    outcomes = [outcome for _, (outcome, _) in results]
    n_converted, n_existing = outcomes.count(CONVERTED), outcomes.count(EXISTING)
    print(f"{n_converted} files converted, {n_existing} existed already: {args.path_out}")
    clipped = [f"{path} ({n_samples})" for path, (_, n_samples) in results if n_samples]
    if clipped:
        print(
            f"warning: samples beyond [-1, 1] were clipped in {counted(len(clipped), 'file')}: "
            f"{first_few(clipped, 20)}"
        )
    failed = [(path, outcome) for path, (outcome, _) in results if outcome not in DONE]
    failures = [f"{path}: {outcome}" for path, outcome in failed]
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
    add("--n_threads", type=int, default=n_processors(), metavar="N",
        help="files converted in parallel (default: one per processor that may be used)")
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
    """Convert one file. Returns CONVERTED, EXISTING or the reason it can't be converted, and what
    the conversion lost, if anything."""
    source, target = os.path.join(args.path_db, path), target_of(args, path)
    try:
        if is_converted(source, target, args.out_sample_rate):
            return EXISTING, ""
        with open_audio(source) as audio:
            if audio.frames == 0:
                return "empty", ""
            same_format = args.out_extension == args.file_extension
            with atomic_path(target) as temporary:
                same_rate = audio.samplerate == args.out_sample_rate
                if same_format and same_rate and audio.knows_length:
                    shutil.copyfile(source, temporary)
                    return CONVERTED, ""
                return CONVERTED, write_audio(temporary, audio, args.out_sample_rate, resample)
    except (OSError, soundfile.SoundFileError, UserError) as error:
        return reason(error), ""


def is_converted(source, target, rate):
    """Whether `target` exists, with this rate, and is no older than `source`."""
    if not os.path.exists(target) or os.path.getmtime(target) < os.path.getmtime(source):
        return False
    header = read_header(target)
    return header.rate == rate and not header.problem


def write_audio(path, audio, rate, resample):
    """Write the open file `audio` at `rate` Hz, with 16 bits if the format supports them.

    Returns how many samples were clipped, as text, or "" if none was. Raises UserError for what
    can't be audio.
    """
    if not LOWEST_RATE <= audio.samplerate <= HIGHEST_RATE:
        raise UserError(f"its header gives an impossible rate: {audio.samplerate} Hz")
    format_ = format_of(path)
    subtype = "PCM_16" if soundfile.check_format(format_, "PCM_16") else None
    n_samples = n_beyond = 0
    with soundfile.SoundFile(path, "w", rate, audio.channels, subtype, format=format_) as new:
        for block in resampled_blocks(audio, rate, resample):
            if not np.isfinite(block).all():
                raise UserError("contains NaN or infinite samples")
            n_samples, n_beyond = n_samples + block.size, n_beyond + int((abs(block) > 1).sum())
            new.write(block.clip(-1, 1))
    if n_beyond > MOST_BEYOND * n_samples:
        raise UserError(TOO_LOUD)
    return f"{n_beyond:,} of {n_samples:,}" if n_beyond else ""


def format_of(path):
    """soundfile's name of the format with this extension."""
    return os.path.splitext(path)[1][1:].upper()


def resampled_blocks(audio, rate, resample):
    """The rest of the open file `audio` at `rate` Hz, in arrays (n, channels) float32.

    Blocks of whole seconds begin at whole samples at both rates, and each is resampled together
    with a margin that is cut off: the result is the same as resampling the whole file at once.
    """
    old, seconds = audio.samplerate, max(MARGIN, BLOCK // -(-audio.channels // 8))
    samples = audio.read((seconds + MARGIN) * old, dtype="float32", always_2d=True)
    before = 0
    if (old // math.gcd(old, rate)) * (rate // math.gcd(old, rate)) > LARGEST_KERNEL:
        resample = interpolate
    while True:
        following = audio.read(seconds * old, dtype="float32", always_2d=True)
        block = resample(torch.from_numpy(samples.T.copy()), old, rate).T.numpy()
        if len(following) == 0:
            yield block[before * rate :]
            return
        yield block[before * rate : (before + seconds) * rate]
        samples = np.concatenate([samples[(before + seconds - MARGIN) * old :], following])
        before = MARGIN


def interpolate(waveform, old, rate):
    """As torchaudio's `resample`, by the same filter: a sinc under a Hann window, six zero
    crossings to each side (Smith, "Digital Audio Resampling", 2002).

    Its table of the filter at all distances between samples of both rates takes memory and time by
    the product of the reduced rates, this by the number of samples alone: the filter is evaluated
    for each.

    waveform: (channels, n) float32 -> (channels, n * rate / old rounded up)
    """
    cutoff = 0.99 * min(old, rate) / old  # relative to half the old rate
    reach = math.ceil(6 / cutoff)  # old samples on each side of a new one
    padded = np.pad(waveform.numpy(), [(0, 0), (reach, reach)])
    around = sliding_window_view(padded, 2 * reach + 1, axis=1)  # (channels, n, 2 * reach + 1)
    new = np.empty((len(waveform), -(-waveform.shape[1] * rate // old)), dtype=np.float32)
    step = max(1, 2**20 // (around.shape[2] * len(waveform)))
    for start in range(0, new.shape[1], step):
        index = np.arange(start, min(start + step, new.shape[1]))
        nearest, rest = np.divmod(index * old, rate)
        t = (np.arange(-reach, reach + 1) - rest[:, None] / rate) * cutoff
        window = np.cos(t.clip(-6, 6) * np.pi / 12) ** 2
        weights = (cutoff * np.sinc(t) * window).astype(np.float32)
        new[:, index] = np.einsum("cnt,nt->cn", around[:, nearest], weights)
    return torch.from_numpy(new)


if __name__ == "__main__":
    main()
