"""Reading audio files: their headers, and their samples directly into memory."""

import math
import os
import threading
from typing import NamedTuple

import numpy as np
import soundfile

from utils.files import check_content
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME

LONGEST_FILE = 2**32  # samples (74 hours): a header that claims more isn't believed
SAMPLES_PER_BYTE = 8192  # more than any codec achieves, even FLAC on digital silence
LARGE_HEADER = 4096  # bytes: a larger file that claims no samples must hold some
NO_LENGTH = "its header says 0 samples of {:,} bytes: `sox --ignore-length OLD NEW` completes it"
BLOCK = 2**20  # samples read at once if their number is unknown
CHANGED = "changed since the database was listed; --ignore_cache lists it again"
SILENT = "digital silence, or channels that cancel: all samples, averaged over channels, are equal"
FITS_INT16 = {"PCM_16", "PCM_S8", "PCM_U8", "ULAW", "ALAW"}  # encodings that fit 16 bits exactly
MOST_BEYOND = 0.1  # fraction of samples beyond [-1, 1] in loud audio; above it, it can't be audio
TOO_LOUD = "many samples lie far beyond [-1, 1] (integers stored as floats? divide by 32768)"
_first_warning = threading.Lock()  # never released


class Header(NamedTuple):
    """The properties of an audio file before it is decoded."""

    samples: int
    rate: int = SAMPLE_RATE  # Hz
    fits_int16: bool = True  # mono, and 16 bits represent its samples exactly
    problem: str = ""  # why the file is unusable, if it is


def read_header(path):
    """The `Header` of an audio file; errors end up in `problem` and are never raised.

    A file that claims an impossible length is decoded to its end, to count its samples.
    """
    try:
        with open_audio(path) as file:
            samples = file.frames if file.knows_length else sum(map(len, file.blocks_to_end()))
            return Header(samples, file.samplerate, fits_int16(file), "" if samples else "empty")
    except (OSError, soundfile.SoundFileError) as error:
        return Header(0, problem=reason(error))


class AudioFile(soundfile.SoundFile):
    """An audio file that is read from its beginning to its end, or from `seek` on.

    knows_length: whether `frames` is plausible. An encoder that writes to a pipe can't go back to
        the header to fill in the length: some leave it out, others claim the largest possible.
    position: the place in the file, in samples
    """

    def __init__(self, path):
        super().__init__(path)
        self.knows_length = self.frames <= min(
            LONGEST_FILE, SAMPLES_PER_BYTE * os.path.getsize(path)
        )
        self.position = 0

    def read(self, frames=-1, **options):
        """As soundfile's. Raises OSError if the file has fewer samples than its header claims."""
        samples = super().read(frames, **options)
        self.position += len(samples)
        wanted = len(options["out"]) if "out" in options else frames
        if self.knows_length and len(samples) < wanted and self.position < self.frames:
            raise OSError(f"ends after {self.position} samples, but its header says {self.frames}")
        return samples

    def seek(self, frames, whence=soundfile.SEEK_SET):
        self.position = super().seek(frames, whence)
        return self.position

    def seekable(self):
        """No: soundfile would seek after each `read`, which fails where the length is unknown."""
        return False

    def blocks_to_end(self, size=None):
        """Yield the rest of the file as arrays (n, channels) float32.

        size: samples per block; without it, all at once if possible.
        """
        all_at_once = self.knows_length and not size
        size = size or (self.frames if self.knows_length else BLOCK)
        while True:
            block = self.read(size, dtype="float32", always_2d=True)
            yield block
            if all_at_once or len(block) < size:
                return


def open_audio(path):
    """An open `AudioFile`. Raises OSError or soundfile.SoundFileError.

    soundfile opens one file at a time, whatever the number of threads. So the beginning of the
    file is read first: threads then wait for slow storage in parallel, and errors of the file
    system get proper messages. The name is bytes, since file names need not be valid UTF-8.

    A header that says 0 samples is an OSError, too: libsndfile would read none, although there are
    some in WAV and AU files of a program that can't go back to the header.
    """
    name = os.fsencode(path) if os.name == "posix" else path
    check_content(name)
    with open(name, "rb", buffering=0) as file:
        file.read(8192)
    audio, n_bytes = AudioFile(name), os.path.getsize(name)
    if not audio.frames:
        audio.close()
        raise OSError("empty" if n_bytes < LARGE_HEADER else NO_LENGTH.format(n_bytes))
    return audio


def fits_int16(file):
    """Whether int16 represents the samples of an open file exactly (not the mean of channels)."""
    return file.channels == 1 and file.subtype in FITS_INT16


def reason(error):
    """Why a file couldn't be read, without its name."""
    if isinstance(error, soundfile.LibsndfileError):
        return f"can't be decoded: {error.error_string.strip().rstrip('.')}"
    return getattr(error, "strerror", None) or str(error)


def decode_into(waveform, path, listed_samples):
    """Fill the array `waveform` with the beginning of an audio file.

    waveform: (n,) int16, or float32 in [-1, 1]; channels are averaged
    listed_samples: the length of the file when its header was read
    Returns why the file is unusable, or "" if it is usable.
    """
    try:
        with open_audio(path) as file:
            length = file.frames if file.knows_length else listed_samples
            if (length, file.samplerate) != (listed_samples, SAMPLE_RATE):
                return CHANGED
            if waveform.dtype == np.int16 and not fits_int16(file):
                return "no longer a 16-bit mono file; --ignore_cache lists the database again"
            n_read = _read_mono(file, waveform)
    except FileNotFoundError:
        return "deleted since the database was listed; --ignore_cache lists it again"
    except (OSError, soundfile.SoundFileError) as error:
        return reason(error)
    if n_read < len(waveform):  # its header doesn't say how many there are
        return CHANGED
    if waveform.dtype == np.float32 and not np.isfinite(waveform).all():
        return "contains NaN or infinite samples"
    warn_of_loudness(path, waveform)
    return ""


def warn_of_loudness(path, waveform):
    """Print a warning if an array (n,) can hardly be audio; only for the first such file."""
    if waveform.dtype == np.int16 or np.mean(np.abs(waveform) > 1) <= MOST_BEYOND:
        return
    if _first_warning.acquire(blocking=False):
        print(f"warning: {path}: {TOO_LOUD}; other such files aren't named", flush=True)


class Extremes:
    """The lowest and the highest sample of audio read in blocks, averaged over channels."""

    def __init__(self):
        self.n_samples, self.lowest, self.highest = 0, math.inf, -math.inf

    def add(self, samples):
        """Count in the next samples, (n,)."""
        self.n_samples += len(samples)
        self.lowest = min(self.lowest, samples.min(initial=math.inf))
        self.highest = max(self.highest, samples.max(initial=-math.inf))

    @property
    def is_silent(self):
        """`is_silent` of all samples."""
        return self.n_samples > 1 and self.lowest == self.highest


def is_silent(waveform):
    """Whether all samples (n,) are equal; for most files, the beginning is enough to see."""
    return len(waveform) > 1 and all(
        (part == waveform[0]).all() for part in (waveform[:SAMPLES_PER_FRAME], waveform)
    )


def _read_mono(file, waveform):
    if file.channels == 1:
        return len(file.read(out=waveform))
    channels = file.read(len(waveform), dtype="float32", always_2d=True)
    np.mean(channels, axis=1, out=waveform[: len(channels)])
    return len(channels)
