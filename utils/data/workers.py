"""Threads for work that waits for storage or releases the GIL, such as decoding audio."""

import threading

from utils.run.console import progress

SECONDS_BEFORE_BAR = 0.5  # how long to wait before showing a progress bar


class Workers:
    """Threads that apply `work` to each item; the first exception stops them all.

    They hold no reference to this object, so deleting it stops them too, each after its current
    item. Python's own executors would finish all items before the program can exit.
    """

    _shared = None  # in case a signal arrives before __init__ is done

    def __init__(self, work, items, n_threads):
        """Start at once; `items` is a list."""
        self._shared = _SharedWork(work, items, max(1, min(n_threads, len(items))))
        for _ in range(self._shared.n_running):
            threading.Thread(target=self._shared.run, name="worker", daemon=True).start()

    def check(self):
        """Raise the exception of a thread, if there is one. Never waits."""
        if self._shared.error is not None:
            raise self._shared.error

    def results(self, what, unit):
        """Wait, with a progress bar if it takes long; return results in the order of the items."""
        try:
            if not self._shared.finished.wait(SECONDS_BEFORE_BAR):
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
        """Stop the threads, each after its current item, without waiting for them."""
        if self._shared:
            self._shared.stopped.set()

    def __del__(self):
        self.stop()


class _SharedWork:
    """The state shared by the threads of `Workers`."""

    def __init__(self, work, items, n_threads):
        self.work, self.items = work, items
        self.results = [None] * len(items)
        self.n_begun, self.n_running = 0, n_threads
        self.error = None
        self.lock = threading.Lock()
        self.stopped, self.finished = threading.Event(), threading.Event()

    def run(self):
        """The loop of each thread."""
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
