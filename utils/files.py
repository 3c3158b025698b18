"""Files that are written completely or not at all, and that can't run code when they are read."""

import argparse
import contextlib
import itertools
import json
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.serialization import safe_globals

from utils.misc import UserError, nfc

TEMPORARY_PREFIX = ".writing-"  # marks temporary files, so that those of killed runs can be found


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`.

    Readers see the old file or the new one, never a partial one. If the body raises, the temporary
    file is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        prefix=TEMPORARY_PREFIX, suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    try:
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private; results are not
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


@contextlib.contextmanager
def writing_to(path, flag=None, errors=OSError):
    """Turn an OSError of the block into a UserError that names `path` and what to do.

    flag: the flag that chooses the place, if there is one; errors: exceptions to catch
    """
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or error
        other = f"name another place with {flag}" if flag else "name another place"
        raise UserError(
            f"{path}: can't be written ({reason}); free some space, or {other}"
        ) from error


def check_writable(directory, what):
    """Raise UserError if nothing can be written in `directory`, before any work is lost.

    The directory isn't created: the check looks at its nearest existing parent. `what` begins the
    message: the flag and the files to be written.
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
    """Raise OSError for a folder, a pipe or a device: reading one of these might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("not a regular file")


def check_content(path):
    """Raise OSError for an empty file, too, of which libraries give misleading reports."""
    check_regular(path)
    if not os.path.getsize(path):
        raise OSError("empty")


def load_array(path):
    """`np.load`. Raises OSError or ValueError for a file without an array, or with too little."""
    check_content(path)
    try:
        return np.load(path)
    except (MemoryError, EOFError) as error:
        raise ValueError(str(error)) from error


def save_array(path, array):
    """`np.save`, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def lines_of(path):
    """Yield the lines of a text file, with any line ending and without a byte order mark.

    In Unicode's form NFC: names in them are compared with those of files (utils/misc.py).
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            yield from map(nfc, file)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error


def write_lines(path, lines):
    """Write lines of text atomically; `lines` come without line endings."""
    encoding = {"encoding": "utf-8", "errors": "surrogateescape"}  # any file name
    with atomic_path(path) as temporary, open(temporary, "w", **encoding) as file:
        file.writelines(f"{line}\n" for line in lines)


def refuse_to_replace(path, lines, what):
    """Raise UserError if `path` exists and holds anything but these lines.

    what: the content that would be lost, for the message. The calling command has a flag --force.
    """
    if os.path.lexists(path) and not _holds(path, lines):
        raise UserError(
            f"{path}: already exists, with other {what}; name another folder, or replace it with "
            "--force"
        )


def _holds(path, lines):
    """Whether a file can be read and holds exactly these lines."""
    try:
        check_regular(path)
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            there = (line.removesuffix("\n") for line in file)
            return all(a == b for a, b in itertools.zip_longest(there, lines))
    except OSError:
        return False


def save_json(path, value):
    """Write `value` as indented JSON, atomically.

    Python has lone surrogates in file names that aren't UTF-8; in JSON they look like `\\udcff`.
    """
    encoding = {"encoding": "utf-8", "errors": "backslashreplace"}
    with atomic_path(path) as temporary, open(temporary, "w", **encoding) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def load_json(path):
    """The content of a JSON file. Raises UserError, naming the file, if it can't be read."""
    try:
        check_content(path)
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error})") from error


def save_tensors(path, value):
    """`torch.save` of tensors and plain containers, atomically. Raises OSError on a full disk."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch reports every write error this way
            reason = error.__context__
            if isinstance(reason, OSError):
                raise OSError(reason.errno, reason.strerror, str(path)) from error
            raise


def load_tensors(path, device="cpu"):
    """`torch.load` of tensors and plain containers only: nothing in the file can run code.

    argparse.Namespace is allowed too: many programs store their flags as one.
    Raises UserError, naming the file, if it is missing, damaged, or holds anything else.
    """
    try:
        check_content(path)
        with warnings.catch_warnings(), safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about odd pickles: unreadable ones raise below
            value = torch.load(path, map_location=device, weights_only=True)
        _check_sums(path)
        return value
    except pickle.UnpicklingError as error:
        if not _is_pickled(path):
            raise UserError(
                f"{path}: can't be loaded, it isn't a checkpoint: damaged or no PyTorch file"
            ) from error
        raise UserError(
            f"{path}: refused, since it holds more than plain tensors: loading it could run code"
        ) from error
    except Exception as error:  # damaged bytes can raise anything, even struct.error
        reason = re.split(r"\n|\. ", str(error) or type(error).__name__)[0]
        raise UserError(
            f"{path}: can't be loaded, it is damaged or no PyTorch file ({reason})"
        ) from error


def _is_pickled(path):
    """Whether a file looks as if `torch.save` or pickle had written it."""
    with open(path, "rb") as file:
        return file.read(1) == pickle.PROTO or zipfile.is_zipfile(path)


def _check_sums(path):
    """Raise BadZipFile if a checksum of the archive is wrong: `torch.load` doesn't check them.

    A bit flipped on disk or in transit would otherwise become a slightly wrong weight.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
