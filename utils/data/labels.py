"""Phone labels: one id per frame of 10 ms, and a symbol for each id.

A label file has one line `name id id ...` per utterance; label i is the phone at the centre of
frame i, sample 160 i + 80. A symbol file has one line `id symbol` per phone.
"""

import itertools
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.files import lines_of, write_lines
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError, counted, first_few, nfc

FRAMES_PER_SECOND = SAMPLE_RATE // SAMPLES_PER_FRAME
LABELS, SYMBOLS = "converted_aligned_phones.txt", "phones.txt"
SILENCE = "SIL"
USUAL_DIFFERENCE = 2  # frames by which alignments often differ from their audio
LARGE_DIFFERENCE = 3, 0.05  # frames, and fraction of the audio: above both, it is a mismatch
SAME_FACTOR = 0.03  # relative difference of two files' factors that still counts as the same


class Interval(NamedTuple):
    """A phone and its start and end in seconds."""

    start: float
    end: float
    symbol: str


def frames_before(seconds):
    """The number of frames whose centre is before this time."""
    # Decimal times need rounding: otherwise 0.145 s would be after the centre of frame 14.
    return math.ceil(round(seconds * FRAMES_PER_SECOND - 0.5, 6))


def frame_symbols(intervals, duration, between=SILENCE):
    """The phone in each whole frame of `duration` seconds, a list; `between` in the gaps."""
    symbols = [between] * math.floor(round(duration * FRAMES_PER_SECOND, 6))
    for start, end, symbol in intervals:
        first, after = frames_before(start), min(frames_before(end), len(symbols))
        symbols[first:after] = [symbol] * (after - first)
    return symbols


def differ_widely(found, expected):
    """Whether each length differs by more than alignments usually do; arrays or tensors, frames."""
    frames, fraction = LARGE_DIFFERENCE
    return (abs(found - expected) > frames) & (abs(found - expected) > fraction * expected)


def common_factor(found, expected):
    """The factor by which most of several lengths (n,) differ from what is expected, or None."""
    if len(found) < 2:
        return None
    factors = np.asarray(found) / np.maximum(expected, 1)
    factor = float(np.median(factors))
    same = np.abs(factors - factor) <= SAME_FACTOR * factor
    return factor if same.mean() > 0.5 and abs(factor - 1) > LARGE_DIFFERENCE[1] else None


def compare_lengths(labels, samples, paths, path, title):
    """Raise UserError if most files differ widely from their labels; warn if any differs unusually.

    labels, samples: (n,) numbers of labels and of samples; paths: of the audio files; path: of the
    labels; title: of the set.
    """
    n_frames = samples // SAMPLES_PER_FRAME
    too_many = labels - np.ceil(samples / SAMPLES_PER_FRAME).astype(np.int64)
    difference = np.maximum(n_frames - labels, too_many)
    if not (difference > USUAL_DIFFERENCE).any():
        return
    at = int(np.argmax(difference))
    worst = f"{first_few([paths[at]])} ({samples[at]} samples, {labels[at]} labels)"
    wide = differ_widely(labels, n_frames)
    if 2 * wide.sum() > len(labels):
        factor = common_factor(labels, n_frames)
        cause = "do they belong to other audio, or to audio that was cut differently?"
        if factor:
            cause = f"judging by their number, a label lasts {10 / factor:.3g} ms instead of 10 ms"
        raise UserError(
            f"{path}: {wide.sum()} of {len(labels)} files of the {title} are much shorter or "
            f"longer than their labels, such as {worst}; {cause}"
        )
    print(
        f"warning: {title}: {(difference > 0).sum()} of {len(labels)} files are shorter or longer "
        f"than their labels, by {counted(int(difference.max()), 'frame')} at most: {worst}; both "
        "are cut to the shorter"
    )


def runs(labels):
    """Yield (first frame, end frame, label) for each run of equal labels."""
    start = 0
    for label, group in itertools.groupby(labels):
        end = start + sum(1 for _ in group)
        yield start, end, label
        start = end


def label_lines(labels):
    """The lines of a label file. labels: dict name -> ids."""
    return (f"{name} {' '.join(map(str, ids))}" for name, ids in labels.items())


def symbol_lines(symbols):
    """The lines of a symbol file. symbols: dict symbol -> id."""
    ordered = sorted(symbols.items(), key=lambda pair: pair[1])
    return (f"{number} {symbol}" for symbol, number in ordered)


def write_labels(path, labels):
    """Write a label file. labels: dict name -> ids."""
    write_lines(path, label_lines(labels))


def write_symbols(path, symbols):
    """Write a symbol file. symbols: dict symbol -> id."""
    write_lines(path, symbol_lines(symbols))


def read_symbols(path):
    """Read a symbol file into a dict symbol -> id. Raises UserError naming an invalid line."""
    symbols = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        columns = line.split()
        if len(columns) != 2 or not columns[0].isdecimal():
            raise UserError(f"{path}, line {number}: not `id symbol`: {line[:80]!r}")
        if columns[1] in symbols or int(columns[0]) in symbols.values():
            raise UserError(f"{path}, line {number}: {line.strip()!r} is a duplicate")
        symbols[columns[1]] = int(columns[0])
    if not symbols:
        raise UserError(f"{path}: no symbols in this file")
    return symbols


def phone_ids(names, symbols, n_phones, path, optional=()):
    """The ids of the phones that `--silence` names, by symbol or id.

    symbols: dict id -> symbol, or empty; path: of the labels; optional: names that may be missing.
    Raises UserError if any other name is unknown.
    """
    known = {str(number): number for number in range(n_phones)}
    known |= {symbol: number for number, symbol in symbols.items()}
    for name in names:
        if name not in known and name not in optional:
            there_are = first_few(symbols.values()) if symbols else f"numbers below {n_phones}"
            raise UserError(f"--silence {name}: no phone of {path}: {there_are}")
    return [known[name] for name in names if name in known]


def symbols_beside(labels, n_phones=0):
    """The symbols (id -> symbol) in the phones.txt beside a label file.

    labels: path of the label file, or None. Returns {} if there is no valid symbol file, or not
    every id below n_phones has a symbol.
    """
    if not labels or Path(labels).name == SYMBOLS:
        return {}
    try:
        symbols = read_symbols(Path(labels).with_name(SYMBOLS))
    except UserError:
        return {}
    symbol_of = {number: symbol for symbol, number in symbols.items()}
    return symbol_of if symbol_of.keys() >= set(range(n_phones)) else {}


def read_text(path):
    """The content of a text file, in NFC. Raises UserError, naming it, if it can't be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return nfc(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as text ({error})") from error


class PhoneLabels(NamedTuple):
    """Phone labels of utterances by name, one per frame of 10 ms."""

    labels: dict[str, np.ndarray]  # (frames,) int16
    n_phones: int  # highest label + 1
    path: str


def read_phone_labels(path):
    """Read lines `name label label ...`, labels from 0 to 32766; empty lines are ignored.

    Raises UserError with the line number for anything else: other text, a name without labels, a
    duplicate name.
    """
    labels, highest = {}, -1
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        name, *rest = line.split(maxsplit=1)
        try:
            if name in labels:
                raise ValueError(f"{first_few([name])} has labels already")
            labels[name] = _parse_labels(rest)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        highest = max(highest, int(labels[name].max()))
    if not labels:
        raise UserError(f"{path}: no labels in this file")
    return PhoneLabels(labels, highest + 1, os.fspath(path))


def _parse_labels(rest):
    """Labels, (frames,) int16, from the text after the name, if any. Raises ValueError."""
    if not rest:
        raise ValueError("no labels after the name (a line is: name label label ...)")
    try:
        labels = np.fromstring(rest[0], dtype=np.int64, sep=" ")  # seven times as fast as int()
    except ValueError:
        raise ValueError("labels must be whole numbers (a line is: name label label ...)") from None
    if labels.min() < 0 or labels.max() >= np.iinfo(np.int16).max:
        raise ValueError("labels must be from 0 to 32766")
    return labels.astype(np.int16)
