"""What people see while a program runs: progress, and where output goes."""

import contextlib
import errno
import io
import sys
import time

from tqdm import tqdm


class Muted(io.TextIOBase):
    """What a process prints on that isn't the first of its run: nobody reads it."""

    def write(self, text):
        return len(text)


SECONDS_BETWEEN_LINES = 30  # progress of long work where the output is no terminal


def progress(iterable=None, *, what, unit, total=None, unit_scale=False):
    """A tqdm bar on a terminal; elsewhere a plain line now and then, so that log files stay short.

    `what` is what happens ("decoding"), `unit` what is counted (" files"). Short work, over before
    the first line is due, prints nothing outside a terminal.
    """
    terminal = sys.stderr.isatty() and not isinstance(sys.stdout, Muted)
    return (tqdm if terminal else PlainProgress)(
        iterable,
        desc=what,
        unit=unit,
        total=total,
        unit_scale=unit_scale,
        leave=False,
        dynamic_ncols=terminal,
    )


class PlainProgress:
    """The part of tqdm's interface that this program uses, as occasional lines of text."""

    def __init__(self, iterable=None, *, desc, unit, total=None, **_):
        self.iterable, self.desc, self.unit = iterable, desc, unit.strip()
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.n, self.start, self.printed = 0, time.monotonic(), time.monotonic()
        self.postfix = ""

    def __iter__(self):
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def update(self, n=1):
        self.n += n
        now = time.monotonic()
        if now - self.printed < SECONDS_BETWEEN_LINES:
            return
        self.printed = now
        of_total = f" of {self.total}" if self.total else ""
        rate = self.n / (now - self.start)
        print(
            f"{self.desc}: {self.n}{of_total} {self.unit}, {rate:.3g} {self.unit}/s{self.postfix}",
            flush=True,
        )

    def set_postfix_str(self, text, refresh=True):
        self.postfix = f", {text}" if text else ""

    def write(self, text):
        print(text, flush=True)

    def close(self):
        pass


class DroppedWhenFull:
    """A text stream that drops what its full disk has no room for: a run is worth more than its
    log file."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with full_disk_ignored():
            return self.stream.write(text)
        return len(text)

    def flush(self):
        with full_disk_ignored():
            self.stream.flush()


@contextlib.contextmanager
def full_disk_ignored():
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
