"""Writing the files of a capture, and reading them back.

    <directory>/<name>/<name>_batch<first>-<last>.pt   one CPU tensor with a row for each window
    <directory>/index.json                             the origin of each window, and the model and
                                                       flags it was captured with

`directory` belongs to one epoch: `<pathCaptureSave>/<epoch>`. With B windows in a batch, S frames
in a window, M matched frames, W = S - M anchors (the frames predicted from) and P predictions:

    conv_repr          (B, S, E)     float32   output of the encoder
    ctx_repr           (B, S, A)     float32   output of the autoregressive network
    seg_boundaries     (B, S)        int64     1 at the first frame of each segment, else 0
    seg_conv           (B, S, D)     float32   encoded segments, each repeated over its frames
    seg_ctx            (B, S, D)     float32   contexts of segments, likewise
    speaker_align      (B,)          int64     speaker
    phone_align        (B, S)        int64     phone label of each frame, -1 in files without labels
    pred               (B, W, E, P)  float32   predictions, in the order of `prediction_names`
    cpcctc_align       (B, W, M)     int64     the prediction that each matched frame is aligned to
    cpcctc_log_scores  (B, W, M, P)  float32   log-score of each matched frame under each prediction
"""

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from utils.files import (
    load_json,
    load_tensors,
    remove_leftovers,
    save_json,
    save_tensors,
    writing_to,
)
from utils.misc import UserError

INDEX = "index.json"
_FILE_NAME = re.compile(r"(?P<name>.+)_batch(?P<first>\d+)-(?P<last>\d+)\.pt")


def prediction_names(n_predictions: int, flags: Mapping[str, object]) -> list[str]:
    """Names of the P predictions in the order of the criterion: blank, self loop, 1, 2, ...

    flags: a dict of the run's flags. Without them (the original's captures have no index) the
    extra predictions can't be identified: all are numbered from 0, with a `#` in front.
    """
    if "CPCCTCSelfLoop" not in flags:
        return [f"#{p}" for p in range(n_predictions)]
    extra = ["blank"] * bool(flags.get("CPCCTCLearnBlank"))
    extra += ["self"] * bool(flags["CPCCTCSelfLoop"])
    return extra + [str(k) for k in range(1, n_predictions - len(extra) + 1)]


class CaptureWriter:
    """Writes the capture of one epoch; a context manager, or finished by calling `close`.

    A capture replaces an earlier one in its directory, so that the windows of two captures never
    mix; `removed` is the number of files deleted for this. Tensors are written immediately and not
    kept in memory; only the locations of the windows are, for the index that `close` writes.

    Several processes may write different windows: one creates the writer and hands copies of it to
    the others. At the end it collects their `windows` and closes.

    Raises UserError, naming the directory, if it can't be written or the disk is full.
    """

    def __init__(self, directory, what, *, epoch, checkpoint=None, flags=None):
        self.directory, self.what = Path(directory), tuple(what)
        self.windows = []  # entries of the index
        self._header = {
            "epoch": epoch,
            "checkpoint": None if checkpoint is None else os.fspath(checkpoint),
            "what": list(self.what),
            "flags": dict(flags or {}),
        }
        with self._writing():
            self.removed = _remove_capture(self.directory)
            for name in self.what:
                (self.directory / name).mkdir(parents=True, exist_ok=True)

    def write(self, first, tensors, locations):
        """Write one batch: windows `first`, `first + 1`, ..., one per location.

        tensors: name -> tensor with a row for each window; names that aren't captured are ignored
        locations: (file, offset in samples) of each window
        """
        last = first + len(locations) - 1
        for name in self.what:
            if len(tensors[name]) != len(locations):
                raise ValueError(f"{name}: {len(tensors[name])} rows, {len(locations)} locations")
            with self._writing():
                path = self.directory / name / f"{name}_batch{first}-{last}.pt"
                save_tensors(path, _as_stored(tensors[name]))
        self.windows += [
            {"window": window, "file": os.fspath(file), "offset": int(offset)}
            for window, (file, offset) in enumerate(locations, first)
        ]

    def close(self):
        """Write the index of all windows, in ascending order."""
        windows = sorted(self.windows, key=lambda entry: entry["window"])
        with self._writing():
            save_json(self.directory / INDEX, {**self._header, "windows": windows})

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error is None:
            self.close()

    def _writing(self):
        return writing_to(self.directory, "--pathCaptureSave")


def refuse_to_lose(directory, what):
    """Raise UserError if the capture in `directory` holds names that aren't among `what`."""
    held = {name for name, *_ in _capture_files(directory)} if directory.is_dir() else set()
    lost = sorted(held - set(what))
    if lost:
        raise UserError(
            f"{directory}: holds a capture of {', '.join(lost)}, which this one would delete; "
            "capture these as well, or name another directory with --pathCaptureSave"
        )


def _as_stored(tensor):
    """A CPU tensor of the type to be stored, whose storage holds nothing else."""
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    stored = tensor.detach().to("cpu", dtype).contiguous()
    whole = stored.untyped_storage().nbytes() == stored.nbytes
    return stored if whole else stored.clone()  # a view would be saved with its whole storage


def _capture_files(directory):
    """Yield (name, first, last, path) for each file of the capture in `directory`."""
    for folder in sorted(directory.iterdir()):
        if folder.is_symlink() or not folder.is_dir():
            continue
        for path in folder.iterdir():
            match = _FILE_NAME.fullmatch(path.name)
            if match and match["name"] == folder.name:
                yield folder.name, int(match["first"]), int(match["last"]), path


def _remove_capture(directory):
    """Delete the capture in `directory`, and nothing else; returns the number of its files."""
    if not directory.exists():
        return 0
    (directory / INDEX).unlink(missing_ok=True)
    files = [path for *_, path in _capture_files(directory)]
    for path in (*files, *directory.glob("pictures/window_*.png")):  # drawn from these files
        path.unlink()
    for folder in (directory, *directory.iterdir()):
        if not folder.is_symlink():
            remove_leftovers(folder)
    return len(files)


class CapturedWindow(NamedTuple):
    """Everything captured of one window, and where it begins (None without an index).

    A window may continue into the next file, in which the next window begins.
    """

    window: int
    tensors: dict[str, torch.Tensor]  # without the batch dimension
    file: str | None  # relative to the root of the database
    offset: int | None  # samples


class CaptureReader:
    """Reads a capture, this program's or the original's (which has no index).

    Iterating yields batches, in the order of windows, as dicts name -> tensor; `len` is the number
    of batches. `names` selects some of the captured names. Attributes: `names`, `ranges` (first
    and last window of each batch), `n_windows`, and from the index `epoch`, `checkpoint` and
    `flags` (None, None and {} without one).

    Raises UserError, naming what is wrong, if there is no capture, one of `names` wasn't captured,
    or a file is missing or damaged.
    """

    def __init__(self, directory: str | os.PathLike, names: Iterable[str] | None = None):
        self.directory = Path(directory)
        found = _find_capture(self.directory)
        missing = sorted(set(names or ()) - found.keys())
        if missing:
            raise UserError(
                f"{self.directory}: {', '.join(missing)} not captured, only {', '.join(found)}"
            )
        self.names = tuple(name for name in found if names is None or name in names)
        self._paths = {name: found[name] for name in self.names}
        self.ranges = _common_ranges(self.directory, self._paths)
        self.n_windows = sum(last - first + 1 for first, last in self.ranges)
        self._read_index()

    def _read_index(self):
        path = self.directory / INDEX
        index = load_json(path) if path.exists() else {"windows": []}
        try:
            self._locations = {w["window"]: (w["file"], w["offset"]) for w in index["windows"]}
            self.flags = dict(index.get("flags", {}))
            self.epoch, self.checkpoint = index.get("epoch"), index.get("checkpoint")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: isn't the index of a capture ({error!r})") from error
        held = {window for first, last in self.ranges for window in range(first, last + 1)}
        lost = sorted(self._locations.keys() - held)
        if lost:
            raise UserError(
                f"{self.directory}: the files of window {lost[0]} and {len(lost) - 1} others are "
                f"missing, though {INDEX} lists them; capture again"
            )

    def __len__(self) -> int:
        return len(self.ranges)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return map(self._batch, self.ranges)

    def window(self, window: int) -> CapturedWindow:
        """The `CapturedWindow` with index `window`."""
        at = bisect_right(self.ranges, (window, float("inf"))) - 1
        if at < 0 or window > self.ranges[at][1]:
            raise UserError(
                f"{self.directory}: no window {window} in this capture, which has "
                f"{self.ranges[0][0]} to {self.ranges[-1][1]}"
            )
        row = window - self.ranges[at][0]
        tensors = {name: batch[row] for name, batch in self._batch(self.ranges[at]).items()}
        return CapturedWindow(window, tensors, *self.location(window))

    def location(self, window: int) -> tuple[str | None, int | None]:
        """(file, offset in samples) where a window begins; (None, None) without an index."""
        return self._locations.get(window, (None, None))

    def _batch(self, windows):
        first, last = windows
        batch = {}
        for name, paths in self._paths.items():
            tensor = load_tensors(paths[windows])
            if not isinstance(tensor, torch.Tensor) or tensor.shape[:1] != (last - first + 1,):
                raise UserError(
                    f"{paths[windows]}: damaged, should hold {last - first + 1} windows; "
                    f"capture again"
                )
            batch[name] = tensor
        return batch


def _find_capture(directory):
    """Name -> {(first, last): path} of everything captured into `directory`."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    found = {}
    for name, first, last, path in _capture_files(directory):
        found.setdefault(name, {})[first, last] = path
    if not found:
        epochs = [path.name for path in directory.iterdir() if path.name.lstrip("-").isdigit()]
        advice = f"; choose an epoch: {', '.join(sorted(epochs, key=int))}" if epochs else ""
        raise UserError(f"{directory}: holds no capture{advice}")
    return found


def _common_ranges(directory, paths):
    """The sorted ranges of windows, which must be the same for all names and not overlap."""
    ranges = sorted({windows for files in paths.values() for windows in files})
    for before, after in zip(ranges, ranges[1:], strict=False):
        if after[0] <= before[1]:
            raise UserError(
                f"{directory}: holds files of two captures, with windows {before[0]}-{before[1]} "
                f"and {after[0]}-{after[1]}; delete those of one"
            )
    for name, files in paths.items():
        for first, last in ranges:
            if (first, last) not in files:
                missing = directory / name / f"{name}_batch{first}-{last}.pt"
                raise UserError(
                    f"{missing}: missing, while others of its capture exist; capture again"
                )
    return ranges
