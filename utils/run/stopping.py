"""Stop signals: SIGTERM, Ctrl-C and SIGUSR1 (Slurm's warning) end a run without losing work."""

import contextlib
import os
import signal
import time

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)

REPEATED = 1.0  # seconds in which a signal that comes again is the same one, sent to all processes


class Stopped(BaseException):
    """The user or the scheduler asked the program to stop. `status` is its exit status."""

    def __init__(self, signal_number):
        super().__init__(signal.Signals(signal_number).name)
        self.number = signal_number
        self.status = 128 + signal_number


@contextlib.contextmanager
def signals_held_back():
    """A block in which stop signals wait; processes started in it hold them back from then on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_signals_in():
    """Accept stop signals from now on, and those that were held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class StopSignals:
    """Turns the first stop signal into a `Stopped`, raised where nothing is left half done.

    Inside `deferred()` it is raised at the end of the block, elsewhere at once. Another signal, a
    second or more later, ends the process immediately. Use as a context manager, which restores the
    previous handlers at its end.
    """

    def __init__(self):
        self.requested, self._since = None, 0.0
        self._deferring = False
        self._previous = {}

    def __enter__(self):
        for number in SIGNALS:
            with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        if self.requested is not None:
            if time.monotonic() - self._since > REPEATED:
                os._exit(128 + number)
            return
        self.requested, self._since = number, time.monotonic()
        if not self._deferring:
            raise Stopped(number)

    @contextlib.contextmanager
    def deferred(self):
        """A block that is always finished before the program stops. Blocks may be nested."""
        outer, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = outer
        if not outer:
            self.check()

    def check(self):
        """Raise `Stopped` if a stop was asked for."""
        if self.requested is not None:
            raise Stopped(self.requested)

    @contextlib.contextmanager
    def at_once(self):
        """A block within `deferred()` that needn't be finished before the program stops."""
        outer, self._deferring = self._deferring, False
        try:
            if self.requested is not None and outer:
                raise Stopped(self.requested)
            yield
        finally:
            self._deferring = outer
