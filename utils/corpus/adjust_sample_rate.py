"""Convert audio files to 16 kHz.

    python utils/corpus/adjust_sample_rate.py AUDIO OUT --file_extension .mp3 --out_extension .flac
    python utils/corpus/adjust_sample_rate.py AUDIO LABELS.txt OUT --file_extension .mp3

Converts every file below AUDIO, at any rate and in any format that libsndfile reads (WAV, FLAC,
Ogg, Opus, MP3 and more), to 16-bit files in the same folders below OUT. With LABELS.txt, only files
whose name without extension is the first word of one of its lines. Files that exist already aren't
converted again, so repeating an interrupted call resumes it. Unreadable files are listed at the
end; the exit status is then 2. Samples beyond [-1, 1], which 16 bits can't hold, are clipped and
counted; files with many of them are refused, and silent files are listed.
"""

import math
import os
import shutil
import sys
from collections import Counter
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import utils.run.before_torch  # noqa: F401

import numpy as np
import soundfile
import torch
from numpy.lib.stride_tricks import sliding_window_view

from utils.data.audio import (
    MOST_BEYOND,
    SILENT,
    TOO_LOUD,
    Extremes,
    open_audio,
    read_header,
    reason,
)
from utils.data.labels import read_text
from utils.data.listing import choose_extension, find_files
from utils.data.names import keys_of, name_of
from utils.data.workers import Workers
from utils.files import atomic_path, remove_leftovers
from utils.misc import SAMPLE_RATE, UserError, counted, first_few
from utils.run.command import CommandLine, at_least, command, extension
from utils.run.machine import n_processors
from utils.run.shared_flags import add_extension

BLOCK, MARGIN = 60, 1  # seconds resampled at once, and extra seconds at both ends
CONVERTED, EXISTING = "converted", "exists already"
LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000  # Hz; beyond these, a header can't be right
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
    report(args, results)
    failures = [f"{path}: {result.outcome}" for path, result in results if result.failed]
    if failures:
        raise UserError(
            f"{len(failures)} of {len(paths)} files can't be converted: {first_few(failures, 20)}"
        )


def report(args, results):
    """Print what was done, with warnings; results: (path, Result) pairs."""
    outcomes = [result.outcome for _, result in results]
    n_converted, n_existing = outcomes.count(CONVERTED), outcomes.count(EXISTING)
    rates = Counter(r.rate for _, r in results if r.outcome == CONVERTED).most_common()
    origins = f" ({', '.join(f'{n} of {rate} Hz' for rate, n in rates)})" if rates else ""
    converted = counted(n_converted, "file") + f" converted{origins}"
    print(f"{converted}, {n_existing} existed already: {args.path_out}")
    clipped = [f"{path} ({result.clipped})" for path, result in results if result.clipped]
    if clipped:
        print(
            f"warning: samples beyond [-1, 1] were clipped in {counted(len(clipped), 'file')}: "
            f"{first_few(clipped, 20)}"
        )
    silent = [path for path, result in results if result.is_silent]
    if silent:
        print(f"warning: {counted(len(silent), 'file')}, {SILENT}: {first_few(silent, 20)}")


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
    add_extension(add)
    add("--out_extension", type=extension, metavar="EXT",
        help="of the new files, which also sets their format "
        "(default: that of the old ones); .flac is lossless, .mp3 compresses a second time")
    add("--n_threads", type=int, default=n_processors(), metavar="N",
        help="files converted in parallel (default: one per processor that may be used)")
    return parser


# fmt: on


def parse_arguments(argv):
    args = build_parser().parse_intermixed_args(argv)
    if not os.path.isdir(args.path_db):
        raise UserError(f"{args.path_db}: no such directory")
    args.file_extension = choose_extension(args.path_db, args.file_extension)
    args.out_extension = args.out_extension or args.file_extension
    if format_of("file" + args.out_extension) not in soundfile.available_formats():
        raise UserError(
            f"--out_extension {args.out_extension}: not a format that can be written; "
            "try .flac or .wav"
        )
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


class Result(NamedTuple):
    """The outcome for one file."""

    outcome: str  # CONVERTED, EXISTING or the reason it can't be converted
    clipped: str = ""  # how many of its samples were clipped, if any were
    is_silent: bool = False
    rate: int = 0  # Hz, of the original

    @property
    def failed(self):
        return self.outcome not in (CONVERTED, EXISTING)


def convert_file(args, path, resample):
    """Convert one file. Returns its `Result`."""
    source, target = os.path.join(args.path_db, path), target_of(args, path)
    rate, tally = args.out_sample_rate, Tally()
    try:
        if is_converted(source, target, rate):
            return Result(EXISTING)
        with open_audio(source) as audio, atomic_path(target) as temporary:
            blocks = tally.count(resampled_blocks(audio, rate, resample))
            same_format = args.out_extension == args.file_extension
            if same_format and audio.samplerate == rate and audio.knows_length:
                for _ in blocks:  # what is copied must be usable, too
                    pass
                shutil.copyfile(source, temporary)
                return Result(CONVERTED, "", tally.is_silent, audio.samplerate)
            write_audio(temporary, blocks, rate, audio.channels)
            return Result(CONVERTED, tally.clipped, tally.is_silent, audio.samplerate)
    except (OSError, soundfile.SoundFileError, UserError) as error:
        return Result(reason(error))


def is_converted(source, target, rate):
    """Whether `target` exists, with this rate, and is no older than `source`."""
    if not os.path.exists(target) or os.path.getmtime(target) < os.path.getmtime(source):
        return False
    header = read_header(target)
    return header.rate == rate and not header.problem


class Tally:
    """Counts of the samples of a file, and their extremes."""

    def __init__(self):
        self.n_samples = self.n_beyond = 0  # of all channels
        self.extremes = Extremes()

    def count(self, blocks):
        """Yield each of the blocks (n, channels). Raises UserError for what can't be audio."""
        for block in blocks:
            if not np.isfinite(block).all():
                raise UserError("contains NaN or infinite samples")
            self.n_samples += block.size
            self.n_beyond += int((abs(block) > 1).sum())
            self.extremes.add(block.mean(axis=1))
            yield block
        if not self.n_samples:
            raise UserError("empty")
        if self.n_beyond > MOST_BEYOND * self.n_samples:
            raise UserError(TOO_LOUD)

    @property
    def clipped(self):
        return f"{self.n_beyond:,} of {self.n_samples:,}" if self.n_beyond else ""

    @property
    def is_silent(self):
        """Whether training will report it as silent."""
        return self.extremes.is_silent


def write_audio(path, blocks, rate, n_channels):
    """Write blocks (n, channels) at `rate` Hz, with 16 bits if the format supports them."""
    format_ = format_of(path)
    subtype = "PCM_16" if soundfile.check_format(format_, "PCM_16") else None
    with soundfile.SoundFile(path, "w", rate, n_channels, subtype, format=format_) as new:
        for block in blocks:
            new.write(block.clip(-1, 1))


def format_of(path):
    """soundfile's name of the format with this extension."""
    return os.path.splitext(path)[1][1:].upper()


def resampled_blocks(audio, rate, resample):
    """The rest of the open file `audio` at `rate` Hz, in arrays (n, channels) float32.

    Blocks of whole seconds begin at whole samples at both rates, and each is resampled together
    with a margin that is cut off: the result is the same as resampling the whole file at once.
    """
    if not LOWEST_RATE <= audio.samplerate <= HIGHEST_RATE:
        raise UserError(f"its header gives an impossible rate: {audio.samplerate} Hz")
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
    """Like torchaudio's `resample`, with the same filter: a sinc under a Hann window, six zero
    crossings to each side (Smith, "Digital Audio Resampling", 2002).

    torchaudio tabulates the filter at all distances between samples of both rates, which takes
    memory and time in proportion to the product of the reduced rates. Here the filter is evaluated
    for each sample, so only their number matters.

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
