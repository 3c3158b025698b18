"""One program at a time in a directory: the lock that a training run takes on its own.

The lock is the file `checkpoint.lock`, which says who holds it, together with the system's lock on
that file (flock). What holds where:

- On one machine only one program can have it. The system gives the lock back when a process dies,
  however it dies, so that the next run takes over what a killed one left.
- Over machines that share a file system the lock holds where that file system passes flock on, as
  NFS does unless it is mounted with `nolock`. Elsewhere what the file says has to do: one that
  another machine wrote is never taken over, since nothing here can tell whether its process lives.
- On a file system without any locks, nothing but that last rule is left, and the program says so.

A process forked while the lock is held doesn't share it.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from utils.misc import UserError
from utils.run.resolve import works_on_checkpoint

LOCK_NAME = "checkpoint.lock"
_held = set()  # descriptors of the locks of this process


def _forget_after_fork():
    """Close what a forked child inherited: open there, it would outlive the parent's death."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_after_fork)


@contextlib.contextmanager
def training_lock(args, world):
    """A block in which a training run has the directory of its checkpoints to itself.

    Calls that capture or probe write nothing there, and take no lock.
    """
    with contextlib.ExitStack() as held:
        if not works_on_checkpoint(args):
            world.on_rank_zero(lambda: held.enter_context(locked_for_training(args.pathCheckpoint)))
        yield


def locked_for_training(path):
    if os.path.isfile(path):
        raise UserError(
            f"--pathCheckpoint {path}: is a file; training needs a directory (to start from this "
            "checkpoint's weights, use --load)"
        )
    return locked(path, "--pathCheckpoint")


@contextlib.contextmanager
def locked(directory, flag):
    """A block in which no other program is in such a block with this directory.

    The directory is made if it isn't there, and goes again if it was and nothing is in it at the
    end. `flag` names it on the command line. Raises UserError if another program has the lock, if
    another machine may have it, or if the directory can't be made or written.
    """
    directory, process = Path(directory), os.getpid()
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {directory}: can't be made ({error.strerror})") from error
    try:
        handle = _take(directory / LOCK_NAME, flag)
    except OSError as error:
        raise UserError(f"{flag} {directory}: can't be written ({error.strerror})") from error
    _held.add(handle)
    try:
        yield
    finally:
        if os.getpid() == process:
            _give_back(handle, directory / LOCK_NAME)
            with contextlib.suppress(OSError):  # the first that isn't empty
                for place in missing:
                    place.rmdir()


def _take(path, flag):
    """The descriptor of the lock file, locked by this process and with its name in it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _lock(handle, path)
            if free and not _is_at(handle, path):
                os.close(handle)  # its holder removed the file between our two steps
                continue
            _check_owner(handle, path, free, flag)
            _write_owner(handle)
        except BaseException:
            os.close(handle)
            raise
        return handle


def _lock(handle, path):
    """Take the system's lock; False if another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        print(
            f"warning: {path.parent}: this file system has no locks: take care that no other "
            "program trains into this directory"
        )
    return True


def _is_at(handle, path):
    """Whether the file that is open is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _check_owner(handle, path, free, flag):
    """Raise UserError unless a lock that is `free` was left behind on this machine, or is new."""
    owner = _read_owner(handle)
    who = "process {pid} on {host}, since {started}".format_map(owner)
    if not free:
        raise UserError(
            f"{flag} {path.parent}: another program is training into it ({who}); stop that one, or "
            "name another directory"
        )
    if owner["host"] not in ("?", socket.gethostname()):
        raise UserError(
            f"{flag} {path.parent}: another machine is training into it ({who}); if that process "
            f"is gone, remove {path}"
        )
    if owner["host"] != "?":
        print(f"note: {path} was left behind by {who}; that process is gone")


def _read_owner(handle):
    """Who the open lock file names, as a dict of ? where it is new or damaged."""
    owner = dict.fromkeys(("pid", "host", "started"), "?")
    with contextlib.suppress(ValueError):
        content = json.loads(os.pread(handle, 10_000, 0))
        if isinstance(content, dict):
            owner |= {key: str(content[key]) for key in owner.keys() & content.keys()}
    return owner


def _write_owner(handle):
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(owner) + "\n").encode(), 0)


def _give_back(handle, path):
    """Remove the lock file, then let go of the lock: nobody can take the file that goes."""
    with contextlib.suppress(OSError):
        if _is_at(handle, path):
            path.unlink()
    _held.discard(handle)
    os.close(handle)
