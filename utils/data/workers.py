"""Threads for work that waits for storage or leaves Python's lock, such as decoding audio."""

import threading

from utils.run.console import progress

PATIENCE = 0.5  # seconds of waiting before a progress bar appears


class Workers:
    """Threads that apply `work` to every item; the first exception ends them all.

    They hold no reference to this object: dropping it ends them too, each after its item in hand.
    Python's own executors would finish everything they were given before the program can exit.
    """

    _shared = None  # until there is something to stop: a signal may arrive before that

    def __init__(self, work, items, n_threads):
        """Start at once; `items` is a sequence."""
        self._shared = _SharedWork(work, items, max(1, min(n_threads, len(items))))
        for _ in range(self._shared.n_running):
            threading.Thread(target=self._shared.run, name="worker", daemon=True).start()

    def check(self):
        """Raise what a thread has raised, if one has; never waits."""
        if self._shared.error is not None:
            raise self._shared.error

    def results(self, what, unit):
        """Wait, with a progress bar if it takes long, and return results in the order of items."""
        try:
            if not self._shared.finished.wait(PATIENCE):
                self._wait_with_bar(what, unit)
        except BaseException:  # Ctrl-C above all
            self.stop()
            raise
        self.check()
        return self._shared.results

    def _wait_with_bar(self, what, unit):
        shared = self._shared
        with progress(total=len(shared.items), what=what, unit=unit) as bar:
            while not shared.finished.wait(0.2):
                bar.update(shared.n_begun - bar.n)

    def stop(self):
        """End the threads, each after its item in hand; doesn't wait for them."""
        if self._shared:
            self._shared.stopped.set()

    def __del__(self):
        self.stop()


class _SharedWork:
    """What the threads of `Workers` share."""

    def __init__(self, work, items, n_threads):
        self.work, self.items = work, items
        self.results = [None] * len(items)
        self.n_begun, self.n_running = 0, n_threads
        self.error = None
        self.lock = threading.Lock()
        self.stopped, self.finished = threading.Event(), threading.Event()

    def run(self):
        """What each thread does."""
        try:
            while (i := self._next()) is not None:
                self.results[i] = self.work(self.items[i])
        except BaseException as error:
            self.error = self.error or error
            self.stopped.set()
            self.finished.set()
        with self.lock:
            self.n_running -= 1
            if self.n_running == 0:
                self.finished.set()

    def _next(self):
        with self.lock:
            if self.stopped.is_set() or self.n_begun == len(self.items):
                return None
            self.n_begun += 1
            return self.n_begun - 1
