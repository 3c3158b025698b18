"""Reading and writing files so that each is complete or absent, and none can run code."""

import argparse
import contextlib
import itertools
import json
import os
import pickle
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
from torch.serialization import safe_globals

from utils.misc import UserError

TEMPORARY_PREFIX = ".writing-"  # leftovers of killed runs are recognised by it


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`.

    Whatever happens, a reader finds the old file, the new one or none, never a part of one. If
    the body raises, the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        prefix=TEMPORARY_PREFIX, suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    try:
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private; others read results too
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(directory, what):
    """Raise UserError if nothing can be written in `directory`, before work is lost to that.

    It is judged as far as can be without making the directory: by what there is of its path.
    `what` begins the message: the flag and what would be written.
    """
    existing = Path(directory).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{what} can't be written: {existing} is no directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{what} can't be written: {existing} is read-only for you")


def remove_leftovers(directory):
    """Delete the temporary files that killed runs left in `directory`."""
    for leftover in Path(directory).glob(TEMPORARY_PREFIX + "*"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def check_regular(path):
    """Raise OSError for a folder, or for a pipe or device, which reading might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("not a regular file")


def lines_of(path):
    """The lines of a text file, whatever their ends, without a byte order mark."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            yield from file
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error


def write_lines(path, lines):
    """Write lines of text, given without their ends, atomically."""
    encoding = {"encoding": "utf-8", "errors": "surrogateescape"}  # any name of a file
    with atomic_path(path) as temporary, open(temporary, "w", **encoding) as file:
        file.writelines(f"{line}\n" for line in lines)


def refuse_to_replace(path, lines, what):
    """Raise UserError if `path` is there and holds anything but these lines.

    what: what would be lost, for the message. The command that calls this has a flag --force.
    """
    if os.path.lexists(path) and not _holds(path, lines):
        raise UserError(
            f"{path}: is there already, with other {what}; name another folder, or replace it "
            "with --force"
        )


def _holds(path, lines):
    """Whether a file can be read and has these lines."""
    try:
        check_regular(path)
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            there = (line.removesuffix("\n") for line in file)
            return all(a == b for a, b in itertools.zip_longest(there, lines))
    except OSError:
        return False


def save_json(path, value):
    """Write `value` as indented JSON, atomically.

    File names that are no UTF-8 hold lone surrogates in Python; written as `\\udcff` they are JSON.
    """
    encoding = {"encoding": "utf-8", "errors": "backslashreplace"}
    with atomic_path(path) as temporary, open(temporary, "w", **encoding) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def load_json(path):
    """The content of a JSON file. Raises UserError, naming the file, if it can't be read."""
    try:
        check_regular(path)
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error})") from error


def save_tensors(path, value):
    """`torch.save` of tensors and plain containers, atomically. Raises OSError on a full disk."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # how torch reports any trouble while it writes
            reason = error.__context__
            if isinstance(reason, OSError):
                raise OSError(reason.errno, reason.strerror, str(path)) from error
            raise


def load_tensors(path, device="cpu"):
    """`torch.load` of tensors and plain containers only: nothing in the file can run code.

    An argparse.Namespace is such a container, and how many programs keep their flags.
    Raises UserError, naming the file, if it is missing, damaged, or holds anything else.
    """
    try:
        check_regular(path)
        with warnings.catch_warnings(), safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about odd pickles: what can't be read is said below
            value = torch.load(path, map_location=device, weights_only=True)
        _check_sums(path)
        return value
    except pickle.UnpicklingError as error:
        if not _is_pickled(path):
            raise UserError(
                f"{path}: can't be loaded, it is no checkpoint: damaged or no PyTorch file"
            ) from error
        raise UserError(
            f"{path}: refused, since it isn't a file of plain tensors: loading it could run code"
        ) from error
    except Exception as error:  # damaged bytes raise anything, struct.error among it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: can't be loaded, it is damaged or no PyTorch file ({reason})"
        ) from error


def _is_pickled(path):
    """Whether a file begins as what `torch.save` or pickle writes."""
    with open(path, "rb") as file:
        return file.read(1) == pickle.PROTO or zipfile.is_zipfile(path)


def _check_sums(path):
    """Raise BadZipFile where the archive isn't what was written: `torch.load` doesn't look.

    Bits that change on a disk or on the way would be weights that are a little wrong.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
