"""Output for people while a program runs: where output goes, progress, the lines of an epoch."""

import contextlib
import errno
import io
import os
import statistics
import sys
import threading
import time

import torch
from tqdm import tqdm

from utils.misc import BOUNDARY_RATE, OF_SEGMENTS, counted, mean, percent

# Processes share no bar, and the lock that tqdm would make for that outlives `os._exit`.
tqdm.set_lock(threading.RLock())

SECONDS_BETWEEN_LINES = 30  # of progress, if the output isn't a terminal
LEVELS = {"": "", OF_SEGMENTS: "segments "}  # suffix of names in the logs -> title
STEPS_WATCHED, STARVED = 10, 0.6  # the first steps of a call; fraction of their time: too little

# ----------------------------------------------------------------------------- where output goes


class NullStream(io.TextIOBase):
    """The output of every rank but the first: nobody reads it."""

    def write(self, text):
        return len(text)


class IgnoreDiskFull:
    """A text stream that drops what doesn't fit on a full disk: a run is worth more than its log
    file."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with _disk_full_ignored():
            return self.stream.write(text)
        return len(text)

    def flush(self):
        with _disk_full_ignored():
            self.stream.flush()


@contextlib.contextmanager
def _disk_full_ignored():
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


def survives_full_disk():
    """A block that continues even when the disk of its log file is full."""
    return contextlib.redirect_stdout(IgnoreDiskFull(sys.stdout))


def silence():
    """Print nothing from now on, neither text nor progress."""
    sys.stdout = NullStream()


def discard_output():
    """Keep the interpreter's flush at exit from finding a closed pipe."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


# -------------------------------------------------------------------------------------- progress


def progress(iterable=None, *, what, unit, total=None, unit_scale=False):
    """A tqdm bar on a terminal; elsewhere a plain line now and then, so that log files stay short.

    `what` is what happens ("decoding"), `unit` what is counted (" files"). Short work, over before
    the first line is due, prints nothing outside a terminal.
    """
    terminal = sys.stderr.isatty() and not isinstance(sys.stdout, NullStream)
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


# --------------------------------------------------------------------------------- lines of a run


class Listener:
    """Receives the values of a run as they become known; this one ignores them.

    Values have the keys of `checkpoint_logs.json`; `clock` has the speed of training in the epoch.
    """

    def on_step(self, epoch, batch, n_batches, values, clock):
        """Means over the batches since the last call, every --logging_step batches of an epoch."""

    def on_epoch(self, epoch, values, clock):
        """Values of an epoch: first those of training and validation, then those of each hook."""


class Console(Listener):
    """Prints the values of a run for people; networks: the Networks that are trained."""

    def __init__(self, networks):
        self.step_name, self.has_accuracy = networks.step_name, networks.has_accuracy

    def means(self, values, part):
        """The means of the losses and accuracies of each level, as text; part: "train" or "val"."""
        return ", ".join(
            f"{title}loss {mean(values[f'locLoss_{part}{level}']):.4f}"
            + f" acc {percent(mean(values[f'locAcc_{part}{level}']))}" * self.has_accuracy
            for level, title in LEVELS.items()
            if values.get(f"locLoss_{part}{level}")
        )

    def on_step(self, epoch, batch, n_batches, values, clock):
        means = self.means(values, "train")
        tqdm.write(f"epoch {epoch}  batch {batch} of {n_batches}  {means}  {clock}")
        sys.stdout.flush()

    def before_training(self, values):
        """Print the losses and accuracies in validation before the first step."""
        print(f"before training  validation {self.means(values, 'val')}")

    def on_epoch(self, epoch, values, clock):
        """Print the means of an epoch and, if there are several, each validation accuracy."""
        if "locLoss_val" not in values:  # a hook's own
            return
        training, validation = (self.means(values, part) for part in ("train", "val"))
        print(
            f"epoch {epoch}  training {training}  validation {validation}  "
            f"learning rate {values['learningRate']:.3g}  {clock}",
            flush=True,
        )
        if self.step_name:
            accuracies = " ".join(f"{100 * accuracy:.0f}" for accuracy in values["locAcc_val"])
            print(f"    validation accuracy by {self.step_name} (%): {accuracies}", flush=True)
        rates = [values.get(f"{BOUNDARY_RATE}_{part}") for part in ("train", "val")]
        if None not in rates:
            print("    boundaries per second: {:.1f} drawn, {:.1f} in validation".format(*rates))

    def summary(self, logs, best_row, clock, files):
        """Print the losses and accuracies of the run, and its files.

        best_row: place of the best epoch in the lists of `logs`; files: name -> path.
        """
        for level, title in LEVELS.items():
            if f"locLoss_val{level}" in logs:
                self.validation_table(logs, best_row, level, title or "validation")
        print(f"{'speed, last epoch':<20}{clock}")
        for name, path in files.items():
            print(f"{name:<20}{path}")

    def validation_table(self, logs, best_row, level, title):
        """Print losses and accuracies of a level; level: the suffix of their names."""
        keys = f"locLoss_val{level}", f"locAcc_val{level}"
        epochs, losses, accuracies = (logs[key] for key in ("epoch", *keys))
        rows = [
            (f"{name} ({epochs[row]})", losses[row], accuracies[row])
            for name, row in (("first epoch", 0), ("best epoch", best_row), ("last epoch", -1))
        ]
        if before := logs.get("before_training"):
            rows.insert(0, ("before training", *(before[key] for key in keys)))
        print(f"\n{title:<20}{'loss':>10}" + f"{'accuracy':>12}" * self.has_accuracy)
        for name, loss, accuracy in rows:
            cells = [f"{mean(loss):.4f}", percent(mean(accuracy))] if loss else ["-", "-"]
            print(f"{name:<20}{cells[0]:>10}" + f"{cells[1]:>12}" * self.has_accuracy)


def note_if_starved(forward_backward, state):
    """The same function, which now prints a note if its first calls had to wait for processors.

    The CPU time of the thread that calls it is compared with wall-clock time. That thread only
    rests while it waits for the others, which finish when it does unless something competes. The
    CPU time of all threads would be low for small networks, too, and include those that decode.
    Several ranks wait for each other, or for a GPU: no note is printed for them.
    """
    if state.world.size > 1 or state.device.type != "cpu" or torch.get_num_threads() == 1:
        return forward_backward
    shares = []

    def watched(batch):
        if len(shares) == STEPS_WATCHED:
            return forward_backward(batch)
        start, busy = time.perf_counter(), time.thread_time()
        result = forward_backward(batch)
        shares.append((time.thread_time() - busy) / (time.perf_counter() - start))
        if len(shares) == STEPS_WATCHED and (share := statistics.median(shares)) < STARVED:
            tqdm.write(
                f"note: steps get {percent(share)} of the time of their {torch.get_num_threads()} "
                "threads: other programs, or the limit of a container, take the rest; try a "
                "smaller --threads"
            )
            sys.stdout.flush()
        return result

    return watched


def print_finished(n_epochs):
    print(f"nothing left to do: {counted(n_epochs, 'epoch')} done; a larger --nEpoch continues")
