"""Means and speed of an epoch, and the logs of all epochs (`checkpoint_logs.json`)."""

import time
from collections import deque

import torch

from utils.misc import percent
from utils.run.distributed import ALONE


class RunningMeans:
    """Means, over windows, of the losses and accuracies of each prediction step.

    Sums stay on the device: adding to them never waits for it, reading means does. The gradient's
    norm, if given, is averaged over batches. Each rank of `world` has the sums over its own
    windows; means and `state` are over all ranks, `batches` counts the steps of one.
    """

    def __init__(self, world=ALONE):
        self.world = world
        self.sums, self.norms = 0.0, 0.0  # (2, n) float64: losses, accuracies; a float64 scalar
        self.windows, self.batches = 0, 0
        self._marked = 0.0  # `_totals` at the last call of `means_since_mark`

    def add(self, losses, accuracies, windows, gradient_norm=0.0):
        """Add a batch of `windows` windows with losses (1, n) and accuracies (1, n)."""
        self.sums = self.sums + windows * torch.cat([losses, accuracies]).detach().double()
        self.norms = self.norms + torch.as_tensor(gradient_norm).double()
        self.windows += windows
        self.batches += 1

    def _totals(self):
        """Sums and, as a last column, windows of all processes: (2, n + 1) float64."""
        return self.world.all_reduce(_in_one(self.sums, self.windows) if self.windows else None)

    def means(self):
        """(losses, accuracies): two lists of n numbers. Needs at least one batch."""
        return _per_window(self._totals())

    def mean_gradient_norm(self):
        return float(self.norms) / self.batches

    def means_since_mark(self):
        """`means` of the batches added since the last call of this method."""
        before, self._marked = self._marked, self._totals()
        return _per_window(self._marked - before)

    def state(self):
        """The part that a checkpoint keeps of an epoch in progress."""
        state = {"sums": 0.0, "norms": self.norms, "windows": 0, "batches": self.batches}
        if self.batches:
            totals = self._totals()
            state |= {"sums": totals[:, :-1].clone(), "windows": int(totals[0, -1])}
        return state

    def restore(self, state, device):
        """Continue from `state`: rank 0 takes over what all ranks had done."""
        self.norms, self.batches = _on(device, state["norms"]), state["batches"]
        if self.batches:
            sums = state["sums"]
            self._marked = _in_one(sums, state["windows"])
            if self.world.is_rank_zero:
                self.sums, self.windows = _on(device, sums), state["windows"]


def _in_one(sums, windows):
    return torch.cat([sums, sums.new_full((2, 1), windows)], dim=1).cpu()


def _per_window(totals):
    return (totals[:, :-1] / totals[0, -1]).tolist()


def _on(device, value):
    return value.to(device) if torch.is_tensor(value) else value


class Clock:
    """How fast windows are trained on, and the fraction of the time spent waiting for them.

    It stands still until it is started; made from the `state` of another, it continues that one.
    With a CUDA device, only time in which the device is idle counts as waiting.
    """

    def __init__(self, seconds=0.0, waited=0.0, windows=0, device=None):
        self.started, self.stopped = 0.0, seconds
        self._waited, self.windows = waited, windows
        self.on_cuda = device is not None and device.type == "cuda"
        self._pending = deque()  # begin and end of waits that the device hasn't reached yet

    def start(self):
        self.started, self.stopped = time.perf_counter() - self.seconds, None

    def stop(self):
        self.stopped = time.perf_counter()

    @property
    def seconds(self):
        return (time.perf_counter() if self.stopped is None else self.stopped) - self.started

    def wait_for(self, function, *arguments):
        """Call a function; its time counts as waiting."""
        begun = self._moment()
        try:
            return function(*arguments)
        finally:
            self._pending.append((begun, self._moment()))
            self._count_waits()

    def _moment(self):
        """Now; on CUDA, the time when the device will have finished all work queued so far."""
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count_waits(self):
        while self._pending and (not self.on_cuda or self._pending[0][1].query()):
            begun, ended = self._pending.popleft()
            self._waited += begun.elapsed_time(ended) / 1000 if self.on_cuda else ended - begun

    @property
    def waited(self):
        """Seconds; doesn't wait for the device to reach the latest waits."""
        self._count_waits()
        return self._waited

    def state(self):
        """The part that a checkpoint keeps of an epoch in progress."""
        return {"seconds": self.seconds, "waited": self.waited, "windows": self.windows}

    def __str__(self):
        seconds = max(self.seconds, 1e-9)
        return f"{self.windows / seconds:.3g} windows/s, data wait {percent(self.waited / seconds)}"


def append_epoch(logs, epoch, values):
    """Append an epoch to the lists of `checkpoint_logs.json`; lists without a value get None."""
    done = len(logs.setdefault("epoch", []))
    logs["epoch"].append(epoch)
    for key in values:
        logs.setdefault(key, [None] * done)
    for key, series in logs.items():
        if isinstance(series, list) and key != "epoch":
            series.append(values.get(key))
