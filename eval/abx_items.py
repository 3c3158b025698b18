"""Items, the stretches of speech to compare: reading item files, and cutting out their frames."""

import math
from dataclasses import dataclass

import torch

from eval.abx_distances import Frames, ranges
from utils.data.labels import common_factor, differ_widely, read_text
from utils.misc import UserError, first_few, percent
from utils.run.console import progress

COLUMNS = "file onset offset phone previous-phone next-phone speaker"
SUSPICIOUS_FACTOR = 1.5  # by which features outlast the last item in most files
FILES_TO_COMPARE = 3  # fewest files to conclude that from
SLICINGS = {
    "librilight": "frames whose centre is within the item, without the last of them",
    "centres": "frames whose centre is within the item",
}


@dataclass(frozen=True)
class Items:
    """Columns of equal length: file names, times in seconds, ids of phone, context, speaker."""

    files: tuple[str, ...]
    onset: torch.Tensor  # (I,) float64
    offset: torch.Tensor  # (I,) float64
    phone: torch.Tensor  # (I,) int64
    context: torch.Tensor  # (I,) int64
    speaker: torch.Tensor  # (I,) int64

    def __len__(self):
        return len(self.files)

    def select(self, kept):
        """The items with indices `kept` (K,)."""
        files = tuple(self.files[i] for i in kept.tolist())
        columns = (self.onset, self.offset, self.phone, self.context, self.speaker)
        return Items(files, *(column[kept] for column in columns))

    def of_files(self, n_files):
        """The items of the first `n_files` files."""
        files = set(list(dict.fromkeys(self.files))[:n_files])
        return self.select(torch.tensor([i for i, file in enumerate(self.files) if file in files]))


def read_items(path, any_context=False):
    """The items of a ZeroSpeech item file: a header line, then seven columns per line.

    With `any_context`, all items get the same context. Raises UserError, naming the file and the
    line, for anything else.
    """
    rows = [
        item_row(f"{path}, line {number}", line)
        for number, line in enumerate(read_text(path).splitlines()[1:], 2)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{path}: no item below the header line")
    files, onset, offset, phone, context, speaker = zip(*rows, strict=True)
    return Items(
        files,
        torch.tensor(onset, dtype=torch.float64),
        torch.tensor(offset, dtype=torch.float64),
        ids(phone),
        ids([None] * len(rows) if any_context else context),
        ids(speaker),
    )


def item_row(where, line):
    """Parse one line of an item file: (file, onset, offset, phone, context, speaker)."""
    try:
        file, onset, offset, phone, previous_phone, next_phone, speaker = line.split()
        onset, offset = float(onset), float(offset)
    except ValueError as error:
        raise UserError(f"{where}: not the seven columns `{COLUMNS}`: {line[:80]!r}") from error
    if not 0 <= onset <= offset < math.inf:
        raise UserError(f"{where}: the item can't last from {onset} to {offset} s")
    return file, onset, offset, phone, (previous_phone, next_phone), speaker


def ids(labels):
    """Integer ids in order of first appearance, (I,) int64."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([numbers[label] for label in labels])


def frame_span(onset, offset, n_frames, frame_rate, slicing="librilight"):
    """First frame of each item and the end (one after the last), (I,) int64 each.

    Frame i is centred at (i + 0.5) / frame_rate. "librilight" is the rule of the original program
    and of Libri-light, which drops the last frame; "centres" keeps it.
    """
    first = (frame_rate * onset - 0.5).ceil().long().clamp(min=0)
    end = (frame_rate * offset - 0.5).floor().long() + (slicing == "centres")
    return first, end.clamp(max=n_frames)


def cut_items(items, features_of, frame_rate, slicing="librilight"):
    """Cut the items out of the features of their files.

    `features_of(name)` returns a file's features `(T, H)`, or None if there is no such file;
    `frame_rate` is in Hz. Returns the items that have at least one frame, and their `Frames`.
    Raises UserError if there is none, if features aren't finite, or if H differs between files.
    """
    numbers_of = {}
    for number, name in enumerate(items.files):
        numbers_of.setdefault(name, []).append(number)
    pieces, kept, sizes, lengths = [], [], [], {}
    for name, numbers in progress(numbers_of.items(), what="features", unit=" files"):
        features = features_of(name)
        if features is None:
            continue
        check_features(name, features, pieces)
        numbers = torch.tensor(numbers)
        lengths[name] = len(features), frame_rate * items.offset[numbers].max().item()
        first, end = frame_span(
            items.onset[numbers], items.offset[numbers], len(features), frame_rate, slicing
        )
        long_enough = end > first
        kept.append(numbers[long_enough])
        sizes.append((end - first)[long_enough])
        pieces.append(features[ranges(first[long_enough], sizes[-1])[1]])
    check_ends(lengths, frame_rate)
    if sum(map(len, kept)) == 0:
        raise UserError(
            "no item has a frame of features: check the directory, the file extension and the "
            "frame size"
        )
    kept, sizes = torch.cat(kept), torch.cat(sizes)
    order = kept.argsort()
    starts = sizes.cumsum(0) - sizes
    return items.select(kept[order]), Frames(torch.cat(pieces), starts[order], sizes[order])


def check_ends(lengths, frame_rate):
    """Refuse features that are shorter than the items of their files; warn of much longer ones.

    lengths: file -> (frames, end of its last item in frames). Raises UserError if in most files
    items end well after the features; warns if in most they end at the same fraction of these.
    """
    if not lengths:
        return
    n_frames, ends = torch.tensor(list(lengths.values()), dtype=torch.float64).T
    factor = common_factor(n_frames.numpy(), ends.numpy())
    suggestion = f"; a frame probably lasts {1 / frame_rate / factor:.3g} s" if factor else ""
    beyond = (ends > n_frames) & differ_widely(n_frames, ends)
    name = list(lengths)[int((ends - n_frames).argmax())]
    if 2 * beyond.sum() > len(lengths):
        frames, end = lengths[name]
        raise UserError(
            f"in {beyond.sum()} of {len(lengths)} files the items end after the features, such as "
            f"{first_few([name])} (items to {end / frame_rate:.2f} s, features to "
            f"{frames / frame_rate:.2f} s with --feature_size {1 / frame_rate:g}){suggestion}"
        )
    if factor and factor > SUSPICIOUS_FACTOR and len(lengths) >= FILES_TO_COMPARE:
        print(
            f"warning: in most of {len(lengths)} files the items end at {percent(1 / factor)} of "
            f"the features: is --feature_size {1 / frame_rate:g} right?"
        )


def check_features(name, features, pieces):
    if not torch.isfinite(features).all():
        raise UserError(f"the features of {name} hold NaN or infinite values")
    if pieces and features.shape[1] != pieces[0].shape[1]:
        raise UserError(
            f"the features of {name} have {features.shape[1]} dimensions, those of the files "
            f"before it {pieces[0].shape[1]}"
        )
