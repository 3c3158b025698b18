"""Does this tree still do what another commit did? Runs the same command lines in both.

    python benchmarks/same_results.py BASE [--only NAME,NAME] [--no_timing] [--json FILE]
    python benchmarks/same_results.py BASE --base_dir DIR [--work_dir DIR]

BASE is a commit, checked out into a temporary directory; --base_dir names an existing checkout. The
hundred cases of `benchmarks/trials/cases.py`, one or two commands each, run in both trees on a tiny
corpus: training in all its variants, stopping and resuming, captures, probes, statistics, ABX,
features, the corpus commands, refusals; and each tree resumes runs of the other. Only command lines
and files are used, so everything inside may be rearranged between the two.

Each case is compared by exit statuses, names of all files, tensors and arrays bit for bit, values
of JSON files and checkpoints with their types, and other files byte for byte; pictures and the
report only by name; a refusal only by its status and by being one `error:` line. NOT_EQUAL lists
the keys that are left out. Some cases also need BASE to be right: an unexpected exit status counts
as a difference, even in both trees.

Timing: processor seconds of training steps in both trees in turn, as the difference between a run
on a long list and one on a short list; the ratio is the median over rounds, with the lowest and the
highest.

The exit status is 1 if anything differs; times don't count. With --work_dir, everything written
stays there, with the output of each step in `logs`. Every command is a process that takes about
five seconds of a processor, so the whole takes ten minutes on two idle cores.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import numpy as np
import torch

from benchmarks.trials.cases import CASES, REFUSED, WORDS, write_corpus

ROOT = Path(__file__).resolve().parent.parent
NOT_EQUAL = {  # keys of dicts whose values differ from one call to the next
    "seconds": "how long an epoch took",
    "waited": "how long it waited for data",
    "finished": "when it ended",
    "memory": "the process's largest size",
}
BY_NAME = {".png", ".html"}  # pictures depend on fonts, the report holds times
PATIENCE = 300  # seconds that a step may take
SIGNALS = {"TERM": (signal.SIGTERM, "143"), "KILL": (signal.SIGKILL, "-9")}  # and the exit status
REFUSAL, NO_REFUSAL = "2, one error: line", "2, not one error: line"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
LARGER = (
    "--pathDB long/audio --pathVal long/test.txt --nEpoch 1 --hiddenEncoder 64 --hiddenGar 64 "
    "--sizeWindow 10240 --batchSizeGPU 8 --nPredicts 6 --negativeSamplingExt 64"
)
TIMED = {"cpc": f"RUN {LARGER}", "cpcctc": f"RUN ALIGN {LARGER} --CPCCTCNumMatched 12"}
ALLOWED = 0.03  # a ratio of times farther from 1 than this is marked


def main(argv=None):
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the checkout is removed
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cpc-same-")))
        work = args.work_dir.absolute() if args.work_dir else temporary / "work"
        code = args.base_dir or stack.enter_context(checked_out(args.base, temporary / "code"))
        trees = Tree("BASE", code.absolute(), work / "base"), Tree("HERE", ROOT, work / "here")
        for tree in trees:
            tree.places = {other.name: str(other.work) for other in trees}
        write_corpus(make_directory(trees[0].work) / "corpus")
        shutil.copytree(trees[0].work, trees[1].work)
        rows = [compare_case(name, trees) for name in with_needed(args.only)]
        rows.append(compare_directory("corpus", Comparison(*trees)))
        times = [] if args.no_timing else time_steps(trees, args.rounds)
    differ = [row["case"] for row in rows if row["differences"]]
    print(f"{len(rows)} cases, {len(differ)} differ{': ' if differ else ''}{', '.join(differ)}")
    if args.json:
        args.json.write_text(json.dumps({"base": args.base, "cases": rows, "times": times}))
    return 1 if differ else 0


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("base", metavar="BASE", help="the commit to compare with")
    add("--base_dir", type=Path, metavar="DIR", help="a checkout of it (default: a temporary one)")
    add("--work_dir", type=Path, metavar="DIR", help="keeps all that is written")
    add("--only", type=lambda text: text.split(","), metavar="NAME,NAME", default=list(CASES),
        help="cases, with those that they need (default: all)")  # fmt: skip
    add("--no_timing", action="store_true", help="compare results alone")
    add("--rounds", type=int, default=3, metavar="N", help="of the timing (default: 3)")
    add("--json", type=Path, metavar="FILE", help="results as JSON")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.only) - set(CASES))
    if unknown:
        parser.error(f"--only {unknown[0]}: the cases are {', '.join(CASES)}")
    if args.work_dir and args.work_dir.exists():
        parser.error(f"--work_dir {args.work_dir}: exists already")
    return args


@contextlib.contextmanager
def checked_out(commit, place):
    """A checkout of `commit` in the directory `place`, while the block lasts."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


def make_directory(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def with_needed(names):
    """These cases and those whose results they read, in the order of CASES."""
    wanted = set()
    while names:
        wanted.update(names)
        names = {
            needed
            for name in names
            for needed in re.findall(r"out/([\w-]+)", CASES[name])
            if needed not in wanted
        }
    return [name for name in CASES if name in wanted]


# ---------------------------------------------------------------------------- running the commands


@dataclass
class Tree:
    """A checkout of the program and the directory that its commands run and write in."""

    name: str
    code: Path
    work: Path
    places: dict = None  # name of each tree -> what its `work` is

    def expand(self, step, out):
        """The words of a step of a case that writes to the directory `out`."""
        words = []
        for word in step.split():
            directory, slash, rest = word.partition("/")
            if word in WORDS:
                words += self.expand(WORDS[word], out)
            elif directory in self.places:
                words.append(self.places[directory] + slash + rest)
            else:
                words.append(word.replace("OUT", out))
        return words

    def run_case(self, name):
        """Run a case; returns the exit status of each step, with more about it if it is 2."""
        make_directory(self.work / "out" / name)
        steps = CASES[name].split(" ; ")
        return [self.run_step(s, name, number) for number, s in enumerate(steps)]

    def run_step(self, step, name, number=0):
        out = f"out/{name}"
        verb, *rest = words = self.expand(step, out)
        if verb == "COPY":
            shutil.copytree(self.work / rest[0], self.work / rest[1], dirs_exist_ok=True)
            return "0"
        log = make_directory(self.work.parent / "logs") / f"{name}.{number}.{self.name}"
        process = self.start(rest if verb in SIGNALS else words, log)
        if verb in SIGNALS:
            wait_until((self.work / out / "checkpoint_resume.pt").exists, process)
            process.send_signal(SIGNALS[verb][0])
        try:
            status = process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"not ended after {PATIENCE} s"
        if status == 2:
            said = log.with_name(f"{log.name}.err").read_text().splitlines()
            return REFUSAL if len(said) == 1 and said[0].startswith("error: ") else NO_REFUSAL
        return str(status)

    def start(self, words, log):
        """The process of a command; what it prints goes to files whose names begin with `log`."""
        command = [sys.executable, str(self.code / words[0]), *words[1:]]
        with open(f"{log}.out", "wb") as out, open(f"{log}.err", "wb") as err:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
            return subprocess.Popen(command, cwd=self.work, env=ENVIRONMENT, **streams)


def wait_until(condition, process):
    """Returns at once after the process has ended, too."""
    end = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def expected_statuses(name):
    steps = CASES[name].split(" ; ")
    statuses = [SIGNALS.get(step.split()[0], (None, "0"))[1] for step in steps]
    return [*statuses[:-1], REFUSAL] if name in REFUSED else statuses


# ------------------------------------------------------------------------------------- comparing


def compare_case(name, trees):
    """Run a case in both trees at the same time and compare the outcomes; returns its row."""
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda tree: tree.run_case(name), trees)
    comparison = Comparison(*trees)
    comparison.values("exit statuses", one, other)
    if one == other != expected_statuses(name):
        comparison.differ("exit statuses", f"{one}, not {expected_statuses(name)}")
    return compare_directory(f"out/{name}", comparison)


def compare_directory(directory, comparison):
    """Compare the contents of a directory, too; print and return the row of a case."""
    comparison.directories(directory)
    counts, differences, name = comparison.counts, comparison.differences, Path(directory).name
    numbers = "".join(f"{counts[what]:7} {what}" for what in ("files", "tensors", "values"))
    print(f"{name:20}{numbers}   {'DIFFERENT' if differences else 'same'}", flush=True)
    for difference in differences[:5]:
        print(f"    {difference}")
    if len(differences) > 5:
        print(f"    and {len(differences) - 5} more")
    return {"case": name, **counts, "differences": differences}


class Comparison:
    """Compares what two trees wrote. counts: files, tensors and values; differences: as text."""

    def __init__(self, one, other):
        self.one, self.other = one, other
        self.counts, self.differences = Counter(), []

    def differ(self, where, what):
        self.differences.append(f"{where}: {what}")

    def directories(self, directory):
        """Compare all files below this directory of both trees."""
        one, other = (names_below(tree.work / directory) for tree in (self.one, self.other))
        for tree, names in ((self.one, one - other), (self.other, other - one)):
            for name in sorted(names):
                self.differ(f"{directory}/{name}", f"only in {tree.name}")
        for name in sorted(one & other):
            self.counts["files"] += 1
            if Path(name).suffix not in BY_NAME:
                where = f"{directory}/{name}"
                self.values(where, *(read(tree, where) for tree in (self.one, self.other)))

    def values(self, where, one, other):
        """Compare two trees of dicts and lists with their leaves."""
        if type(one) is not type(other):
            self.differ(where, f"{type(one).__name__}, {type(other).__name__}")
        elif isinstance(one, dict):
            for key in sorted(one.keys() ^ other.keys(), key=str):
                tree = self.one if key in one else self.other
                self.differ(f"{where} {key}", f"only in {tree.name}")
            for key in one.keys() & other.keys() - NOT_EQUAL.keys():
                self.values(f"{where} {key}", one[key], other[key])
        elif isinstance(one, list | tuple):
            if len(one) != len(other):
                self.differ(where, f"{len(one)} items, {len(other)} items")
            for index, pair in enumerate(zip(one, other, strict=False)):
                self.values(f"{where} {index}", *pair)
        elif isinstance(one, np.ndarray):
            self.counts["tensors"] += 1
            self.arrays(where, one, other)
        else:
            self.counts["values"] += 1
            if one != other and not (isinstance(one, float) and math.isnan(one + other)):
                self.differ(where, first_difference(one, other))

    def arrays(self, where, one, other):
        kinds = [f"{array.dtype} {array.shape}" for array in (one, other)]
        if kinds[0] != kinds[1]:
            self.differ(where, ", ".join(kinds))
        elif one.tobytes() != other.tobytes():
            apart = np.abs(one.astype(float) - other.astype(float))
            count = f"{np.count_nonzero(apart)} of {apart.size} elements"
            self.differ(where, f"{count} differ, by {np.nanmax(apart):.3g} at most")


def names_below(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def first_difference(one, other):
    """Two values, shortened to where they differ; of files, the first lines that differ."""
    if isinstance(one, bytes):
        lines = enumerate(zip_longest(one.split(b"\n"), other.split(b"\n")), 1)
        number, pair = next((number, pair) for number, pair in lines if pair[0] != pair[1])
        return f"line {number}: {first_difference(*map(str, pair))}"
    texts = repr(one), repr(other)
    start = max(len(os.path.commonprefix(texts)) - 20, 0)
    return ", ".join(t if len(t) <= 70 else f"...{t[start : start + 60]}..." for t in texts)


def read(tree, name):
    """A file's content, with arrays instead of tensors and without the trees' own directories."""
    path = tree.work / name
    if path.suffix == ".pt":
        with contextlib.suppress(Exception):  # not all need be whole: then compared as bytes
            return comparable(tree, torch.load(path, map_location="cpu", weights_only=True))
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {key: file[key] for key in file.files}
    if path.suffix == ".npy":
        return np.load(path)
    content = path.read_bytes()
    if path.suffix == ".json":
        return comparable(tree, json.loads(content))
    for place in tree.places.values():
        content = content.replace(place.encode(), b"WORK")
    return content


def comparable(tree, value):
    """The same dicts and lists, with arrays instead of tensors and without the directories."""
    if isinstance(value, dict):
        return {key: comparable(tree, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(comparable(tree, item) for item in value)
    if isinstance(value, str):
        for place in tree.places.values():
            value = value.replace(place, "WORK")
    return value.detach().numpy() if torch.is_tensor(value) else value


# ---------------------------------------------------------------------------------------- timing


def time_steps(trees, rounds):
    """Print and return how long training takes HERE, as a ratio to that in BASE."""
    for tree in trees:
        write_corpus(tree.work / "long", utterances=12, seconds=25)
    return [timed(name, trees, rounds) for name in TIMED]


def timed(name, trees, rounds):
    ratios, seconds = [], {tree.name: [] for tree in trees}
    for number in range(rounds):
        for tree in trees if number % 2 else reversed(trees):
            seconds[tree.name].append(seconds_of_steps(tree, name))
        ratios.append(seconds["HERE"][-1] / seconds["BASE"][-1])
    base, here = (statistics.median(seconds[key]) for key in ("BASE", "HERE"))
    ratio, spread = statistics.median(ratios), (min(ratios), max(ratios))
    print(
        f"time of {name:12}BASE {base:.2f} s, HERE {here:.2f} s of the processor, ratio "
        f"{ratio:.3f} ({spread[0]:.3f} to {spread[1]:.3f} in {rounds} rounds)"
        f"{'' if abs(ratio - 1) <= ALLOWED else f': beyond {ALLOWED:.0%}'}",
        flush=True,
    )
    return {"case": name, "ratio": ratio, "spread": spread, "seconds": seconds}


def seconds_of_steps(tree, name):
    """Processor seconds of an epoch, without those for the start and end of a run."""
    spent = {}
    for training in ("train", "test"):
        out = f"out/timed-{name}"
        shutil.rmtree(tree.work / out, ignore_errors=True)
        words = tree.expand(f"{TIMED[name]} --pathTrain long/{training}.txt", out)
        log = make_directory(tree.work.parent / "logs") / f"timed-{name}.{tree.name}"
        process = tree.start(words, log)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{tree.name}: a timed run failed; --work_dir keeps what it printed")
        spent[training] = usage.ru_utime + usage.ru_stime
    return spent["train"] - spent["test"]


if __name__ == "__main__":
    sys.exit(main())
