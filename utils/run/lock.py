"""One program at a time in a directory: the lock that a training run takes on its own.

The lock is the file `checkpoint.lock`, which names its holder, together with the system's lock on
that file (flock). How far it reaches:

- On one machine, only one program can have it. The system releases the lock when a process dies,
  however it dies, so that the next run takes over what a killed one left.
- On machines that share a file system, the lock works if that file system passes flock on, as NFS
  does unless it is mounted with `nolock`. Otherwise the content of the file decides: a lock that
  another machine wrote isn't taken over, since it can't be known here whether its process lives.
- A restarted job of Slurm or torchrun takes over its own lock from a machine that died. If that
  machine is alive after all, cut off or hung, its process finds before its next save that the lock
  names another (`lost_lock`), and ends without writing anything.
- On a file system without any locks, only the content of the file decides, and a warning is given.

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
from utils.run.place import current_job
from utils.run.resolve import works_on_checkpoint

LOCK_NAME = "checkpoint.lock"
_held = {}  # the locks of this process: descriptor -> path and written content


def _forget_after_fork():
    """Close what a forked child inherited: while it is open, the lock outlives the parent."""
    while _held:
        os.close(_held.popitem()[0])


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
    """A block that, for each directory, only one program at a time can be in.

    A missing directory is made, and removed again if nothing is in it at the end. `flag` names it
    on the command line. Raises UserError if another program has the lock, if another machine may
    have it, or if the directory can't be made or written.
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
    try:
        yield
    finally:
        if os.getpid() == process:
            _give_back(handle)
            with contextlib.suppress(OSError):  # the first that isn't empty
                for place in missing:
                    place.rmdir()


def lost_lock():
    """A UserError if a lock that this process took now names another one, else None."""
    for path, written in _held.values():
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            return UserError(f"{path} is gone, as after another run: this one ends without saving")
        except OSError:  # then nothing can be written there, either
            continue
        if found != written:
            who = _in_words(_as_owner(found))
            return UserError(f"{path} was taken over by {who}: this run ends without saving")
    return None


def _take(path, flag):
    """The descriptor of the lock file, which is locked by this process and names it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _lock(handle, path)
            if free and not _is_at(handle, path):
                os.close(handle)  # its holder removed the file between our two steps
                continue
            _check_owner(handle, path, free, flag)
            if not free:  # the process that has it locked is left with a file without a name
                path.unlink(missing_ok=True)
                os.close(handle)
                continue
            _held[handle] = path, _write_owner(handle)
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
            f"warning: {path.parent}: this file system has no locks: make sure that no other "
            "program trains in this directory"
        )
    return True


def _is_at(handle, path):
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _check_owner(handle, path, free, flag):
    """Raise UserError unless a lock may be taken over, or is new."""
    owner = _as_owner(os.pread(handle, 10_000, 0))
    who, elsewhere = _in_words(owner), owner["host"] not in ("?", socket.gethostname())
    job, restarts = current_job()
    of_same_job = elsewhere and owner["job"] == job
    restarted = of_same_job and owner["restarts"].isdigit() and int(owner["restarts"]) < restarts
    if of_same_job and job.startswith("Slurm"):  # another step of it may be alive on that machine
        of_same_job = restarted
    if not free and not restarted:
        raise UserError(
            f"{flag} {path.parent}: another program is training there ({who}); stop that one, or "
            "name another directory"
        )
    if elsewhere and not of_same_job:
        raise UserError(
            f"{flag} {path.parent}: another machine is training there ({who}); if that process is "
            f"gone, remove {path}"
        )
    if elsewhere:
        print(f"note: {path} was taken over from {who}, of the same {job}")
    elif owner["host"] != "?":
        print(f"note: {path} was left behind by {who}; that process is gone")


def _as_owner(content):
    """The owner that a lock file with this content names, a dict; "?" where new or damaged."""
    owner = dict.fromkeys(("pid", "host", "started", "job", "restarts"), "?")
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict):
            owner |= {key: str(found[key]) for key in owner.keys() & found.keys()}
    return owner


def _in_words(owner):
    return "process {pid} on {host}, since {started}".format_map(owner)


def _write_owner(handle):
    """Write this process into the lock file; returns what was written."""
    job, restarts = current_job()
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "job": job,
        "restarts": restarts,
    }
    content = (json.dumps(owner) + "\n").encode()
    os.ftruncate(handle, 0)
    os.pwrite(handle, content, 0)
    return content


def _give_back(handle):
    """Remove the lock file, then release the lock: nobody can lock the file in between."""
    path, _ = _held[handle]
    with contextlib.suppress(OSError):
        if _is_at(handle, path) and not lost_lock():
            path.unlink()
    del _held[handle]
    os.close(handle)
