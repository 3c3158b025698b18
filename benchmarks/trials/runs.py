"""Watched runs of train.py: what they print, how they end, and what they are doing meanwhile.

Importing PyTorch takes seconds, a tiny run tenths of one. So most runs are forked from this
process, which has imported everything and computed nothing; some are separate processes.
"""

import contextlib
import functools
import json
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

import train as training
from dataset import AudioDataset, BatchLoader
from eval.hooks import CaptureHook, ProbeHook
from tests.common import ROOT, assert_equal_trees
from train import main as train
from utils.data.packs import PackDecoding
from utils.report import run_files
from utils.report.page import RunReport
from utils.report.plots import draw_curves
from utils.run import state

TINY = (
    "--hiddenEncoder 8 --hiddenGar 8 --rnnMode linear --negativeSamplingExt 4 --nPredicts 2 "
    "--sizeWindow 3200 --batchSizeGPU 4 --n_process_loader 2 --threads 1 --device cpu "
    "--save_step 1 --random_seed 7"
).split()
OWN_PROCESS = 20  # one in this many runs isn't forked
NOT_COMPARED = {"report.html", "report_data.json"}  # they contain durations
NOT_BEGUN = 255
PATIENCE = 120  # seconds; a run that takes longer hangs
MOST_MEMORY = 8 * 2**30  # bytes of addresses that a forked run may take beyond those it begins with
PHASES = {  # what a run spends its time with -> where that begins and ends
    "start": (),
    "listing": ((BatchLoader, "__init__"), (AudioDataset, "__init__")),
    "decoding": ((PackDecoding, "finish"),),
    "training": ((training, "train_step"),),
    "validation": ((training, "validate"),),
    "saving": ((state, "save_checkpoint"),),
    "capture": ((CaptureHook, "run"),),
    "probe": ((ProbeHook, "run"),),
    "report": ((run_files, "save_json"), (run_files, "draw_curves"), (RunReport, "write")),
}


class Part:
    """One part of the benchmark.

    place: an empty directory; args: the command line; counts: name -> how many there were;
    findings: what went wrong, as text; values: other results, by name.
    """

    def __init__(self, name, place, args):
        self.name, self.place, self.args = name, place, args
        self.counts, self.findings, self.values = Counter(), [], {}
        self.start = time.perf_counter()
        place.mkdir()

    def random(self, number):
        """The generator of a case: the same whatever was run before it."""
        return random.Random(f"{self.args.seed} {self.name} {number}")

    def found(self, number, what):
        self.findings.append(f"{self.name} {number}: {what}")
        print(f"  {self.findings[-1]}", flush=True)

    def must_succeed(self, words):
        """An undisturbed run, that the others are compared with."""
        run = Run(words, self.place / "log").finish()
        if run.status != 0:
            raise SystemExit(f"{self.name}: the undisturbed run fails: {run.finding()}")

    def progress(self, done, total):
        if sys.stderr.isatty() or done % 25 == 0 or done == total:
            end = "\r" if sys.stderr.isatty() else "\n"
            print(f"  {self.name}: {done} of {total}", end=end, file=sys.stderr, flush=True)

    def result(self):
        """For a JSON file."""
        counts = dict(self.counts)
        return {
            "part": self.name,
            "seconds": self.seconds,
            "counts": counts,
            "findings": self.findings,
            **self.values,
        }


class Run:
    """A call of `python train.py`, started at once; or of `function`, in a forked process.

    words: the command line; log: a Path beside which the output is kept (of stdout, beside `out`);
    forked: not a separate process; status: None until it has ended, then the exit status or minus
    the signal.
    """

    def __init__(self, words, log, *, out=None, forked=True, function=train):
        self.words, self.forked, self.status = [str(word) for word in words], forked, None
        self.out, self.err = Path(f"{out or log}.out"), Path(f"{log}.err")
        self._phase = mmap.mmap(-1, 1)  # shared with the forked process
        self._phase[0] = NOT_BEGUN
        self.hangs = False
        sys.stdout.flush()
        with open(self.out, "wb") as stdout, open(self.err, "wb") as stderr:
            if forked:
                self.pid = os.fork() or self._be_the_child(stdout, stderr, function)
                self.wait(lambda: self._phase[0] != NOT_BEGUN)
                return
            command = [sys.executable, str(ROOT / "train.py"), *self.words]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
            )
            self.pid = self._process.pid

    def _be_the_child(self, stdout, stderr, function):
        """Does not return."""
        status = 1
        try:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
            limit = _address_space() + MOST_MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            _mark_phases(self._phase)
            status = function(self.words) or 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    @property
    def phase(self):
        """The current activity; unknown for a separate process."""
        return list(PHASES)[self._phase[0]] if self.forked else "own process"

    def ended(self):
        if self.status is None:
            if not self.forked:
                self.status = self._process.poll()
            else:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, until=lambda: False, patience=PATIENCE):
        """Wait for a condition, or the end of the run; returns whether it has ended."""
        deadline = time.monotonic() + patience
        while not self.ended() and not until():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return self.status is not None

    def finish(self):
        """Wait for the end, at most PATIENCE seconds."""
        if not self.wait():
            self.hangs = True
            self.signal(signal.SIGKILL)
            self.wait()
        return self

    def signal(self, number):
        if not self.ended():
            os.kill(self.pid, number)

    def printed(self):
        return self.out.read_text(errors="replace")

    def complaint(self):
        return self.err.read_text(errors="replace")

    def finding(self):
        """A description of an end that is neither a success nor a refusal in one line; else "".

        Decoders in C print notes of their own about broken files.
        """
        if self.hangs:
            return "hangs"
        lines = self.complaint().strip().splitlines()
        traceback = any(word in line for line in lines for word in ("Traceback", "Exception"))
        refusals = sum(line.startswith("error: ") for line in lines)
        if self.status == 0 and not traceback and not refusals:
            return ""
        if self.status == 2 and not traceback and refusals == 1 and lines[-1].startswith("error: "):
            return ""
        return f"status {self.status}: {lines[-1] if lines else 'no output'}"


def _address_space():
    """Bytes of address space that this process has taken."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def _mark_phases(shown):
    """Wrap the program's functions so that `shown[0]` is the number of the phase it is in."""
    for number, places in enumerate(PHASES.values()):
        for owner, name in places:
            setattr(owner, name, _marked(getattr(owner, name), number, shown))
    shown[0] = 0


def _marked(function, number, shown):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        before, shown[0] = shown[0], number
        try:
            return function(*args, **kwargs)
        finally:
            shown[0] = before

    return wrapped


def warm_up(directory):
    """Do once what every forked run would repeat: one thread, and fonts for the pictures."""
    torch.set_num_threads(1)
    draw_curves({"epoch": [0]}, directory / "warm_up.png")


def on(corpus):
    """The flags of a corpus written by `write_tiny_corpus`."""
    return ["--pathDB", corpus / "audio", "--pathTrain", corpus / "train.txt",
            "--pathVal", corpus / "test.txt"]  # fmt: skip


def differences(one, other, names=None):
    """Names of the files (default: all) below two directories that aren't in both, or don't hold
    the same, tensors bit for bit."""
    files = [{p.relative_to(top) for p in top.rglob("*") if p.is_file()} for top in (one, other)]
    if names is not None:
        files = [names & found for found in ({str(p) for p in part} for part in files)]
    different = sorted(map(str, files[0] ^ files[1]))
    for name in sorted(files[0] & files[1]):
        try:
            assert_equal_trees(content(one / name), content(other / name), "content")
        except AssertionError as error:
            different.append(f"{name}: {str(error).splitlines()[0]}")
    return different


def content(path):
    """The content of a file that a run wrote; None if it contains the time of day."""
    if path.name in NOT_COMPARED:
        return None
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
