"""A grid of settings and seeds: trains its runs, keeps raw values, and makes tables of them.

    python benchmarks/learning.py benchmarks/grids/starts.json --jobs 2 --minutes 60
    python benchmarks/learning.py benchmarks/grids/starts.json --tables

Trains each run of the grid that has no values yet, takes its measures, and adds them to
benchmarks/results/NAME.json, with the command, the commit and the seconds of each run. Stopped at
any moment, the same command continues. `--tables` only prints what the values so far say, in
Markdown. A grid is JSON:

    what       a sentence
    prepare    commands to run once, before anything else
    run        the command of a run; `--pathCheckpoint {run}` and the seed are added to it
    axes       {axis: {value: flags to add}}
    parts      grids to run, in this order: {"seeds": N, axis: [values], "flags": "...", "then":
               [...]}; an axis that a part doesn't name takes all its values
    then       commands to run after each run, before those of its part: probes, ABX and the like
    measures   {name: where its value is}, one of
                   {"file": FILE, "key": "locAcc_val.-1.mean"}: in a JSON file, here the mean of
                       the last list; times 100 with "percent": true; null if there is no such
                       file or key
                   {"steps_below": F}: steps until the training loss, averaged since the last time
                       it was logged, is below F times the validation loss before training; null
                       where it never is
    tables     [{"title", "rows": [axes], "columns": axis, "measures": [names], axis: [values]}];
               without "columns", each measure has one

Commands are relative to the project. {work} stands for a folder that is kept (--work), {run} for
the run's own, {seed} for its seed and {speech} for the real speech that CPC_DATA names.
"""

import argparse
import itertools
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils.run.before_torch  # noqa: F401

import torch

from tests.common import ROOT
from utils.files import load_json, save_json
from utils.misc import UserError
from utils.run.command import CommandLine, above, at_least, command
from utils.run.console import progress
from utils.run.machine import n_processors

RESULTS = ROOT / "benchmarks" / "results"
STEP = re.compile(r"epoch (\d+)  batch (\d+) of (\d+)  loss (\S+)")
BEFORE_TRAINING = re.compile(r"before training  validation loss (\S+)")
KEYS = {"what", "prepare", "run", "axes", "parts", "then", "measures", "tables"}


@command
def main(argv=None):
    args = parse_arguments(argv)
    grid = read_grid(args.grid)
    name = Path(args.grid).stem
    path = args.results / f"{name}.json"
    results = load_json(path) if path.exists() else {"runs": {}}
    results["grid"] = grid
    if not args.tables:
        work = args.work or Path(tempfile.gettempdir(), f"cpc-learning-{name}")
        complete(grid, results, path, work, args)
    print("\n".join(tables(results)))


def parse_arguments(argv):
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("grid", metavar="GRID.json")
    add("--jobs", type=at_least(1), default=1, help="runs at a time; they share the processors")
    add("--minutes", type=above(0), help="start no run after that")
    add("--work", type=Path, metavar="DIR", help="for corpora and runs (default: temporary)")
    add("--results", type=Path, metavar="DIR", default=RESULTS)
    add("--tables", action="store_true", help="print the tables, train nothing")
    return parser.parse_args(argv)


def read_grid(path):
    """The grid in a file. Raises UserError where it doesn't have the form described above."""
    grid = {"prepare": [], "then": [], "tables": []} | load_json(path)
    if wrong := grid.keys() ^ KEYS:
        raise UserError(f"{path}: {', '.join(sorted(wrong))}: missing or unknown")
    axes = grid["axes"]
    for part in [*grid["parts"], *grid["tables"]]:
        named = {axis: values for axis, values in part.items() if axis in axes}
        for axis, values in named.items():
            if unknown := set(values) - axes[axis].keys():
                raise UserError(f"{path}: {axis} has no {', '.join(sorted(unknown))}")
        others = {"seeds", "flags", "then", "title", "rows", "columns", "measures"}
        if unknown := part.keys() - axes.keys() - others:
            raise UserError(f"{path}: {', '.join(sorted(unknown))}: no axis of the grid")
    return grid


# -------------------------------------------------------------------------------------- the runs


def runs(grid):
    """{name: (settings, command, commands to run after it)} of all runs, in the order of parts."""
    found = {}
    for part in grid["parts"]:
        axes = {axis: part.get(axis, list(values)) for axis, values in grid["axes"].items()}
        for seed in range(1, part["seeds"] + 1):
            for chosen in itertools.product(*axes.values()):
                settings = dict(zip(axes, chosen, strict=True))
                flags = [grid["axes"][axis][value] for axis, value in settings.items()]
                words = [grid["run"], *flags, part.get("flags", "")]
                words += ["--pathCheckpoint {run}", f"--random_seed {seed}"]
                name = "/".join([*chosen, str(seed)])
                then = [*grid["then"], *part.get("then", [])]
                line = " ".join(filter(None, words))
                found.setdefault(name, (settings | {"seed": seed}, line, then))
    return found


def complete(grid, results, path, work, args):
    """Do the runs that `results` lacks, or has of another command or with fewer measures."""
    start, lock, done = time.monotonic(), threading.Lock(), results["runs"]
    todo = {
        name: run
        for name, run in runs(grid).items()
        if not is_up_to_date(done.get(name), run[1], grid)
    }
    if not todo:
        return
    prepare(grid, work)
    threads = max(1, n_processors() // args.jobs)
    bar = progress(what="training", unit=" runs", total=len(todo))

    def do(name):
        if args.minutes and time.monotonic() - start > 60 * args.minutes:
            return
        settings, words, then = todo[name]
        values = measured(name, [words, *then], grid, work, threads)
        result = {"settings": settings, "command": words, **values}
        with lock:
            done[name] = result
            save_json(path, results)
            bar.update()

    path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(do, todo):
            pass


def is_up_to_date(result, words, grid):
    """Whether a result is of this command, and has all measures."""
    return (
        result is not None
        and result["command"] == words
        and result["values"].keys() == grid["measures"].keys()
    )


def prepare(grid, work):
    """Run the grid's preparations that `work` hasn't seen."""
    work.mkdir(parents=True, exist_ok=True)
    record = work / "prepared.json"
    prepared = load_json(record) if record.exists() else []
    for words in grid["prepare"]:
        if words not in prepared:
            call(words, {"work": work}, work / "prepare.log")
            prepared.append(words)
            save_json(record, prepared)


def measured(name, commands, grid, work, threads):
    """Train one run, take its measures, delete it."""
    run, begin = work / name, time.monotonic()
    shutil.rmtree(run, ignore_errors=True)  # what a killed call left may be of another command
    run.mkdir(parents=True)
    log, places = run / "log.txt", {"work": work, "run": run, "seed": name.rpartition("/")[2]}
    for line in commands:
        call(line, places, log, threads)
    values = {
        measure: read_measure(where, log.read_text(), places)
        for measure, where in grid["measures"].items()
    }
    shutil.rmtree(run)
    machine = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
    return {
        "values": values,
        "seconds": round(time.monotonic() - begin, 1),
        "commit": commit(),
        **machine,
    }


def call(words, places, log, threads=None):
    """Run a command of the project; its output is appended to the file `log`."""
    words = [filled_in(word, places) for word in shlex.split(words)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with open(log, "a") as output:
        status = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=output, stderr=output
        ).returncode
    if status:
        raise UserError(f"exit status {status}, see {log}: {shlex.join(words)}")


def filled_in(word, places):
    speech = os.environ.get("CPC_DATA", ROOT.parent / "shared" / "data" / "librispeech_mini")
    return word.format(speech=speech, **places)


def commit():
    """The commit of the results; `-dirty` where files had been changed."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None


# ------------------------------------------------------------------------------------ the measures


def read_measure(where, log, places):
    """The value that a measure describes; log: the text that the run printed."""
    if "steps_below" in where:
        return steps_below(log, where["steps_below"])
    path = Path(filled_in(where["file"], places))
    if not path.exists():
        return None
    value = load_json(path)
    for key in where["key"].split("."):
        if isinstance(value, dict) and key not in value:
            return None
        if key == "mean":
            value = statistics.mean(value)
        else:
            value = value[int(key) if isinstance(value, list) else key]
    return 100 * value if where.get("percent") else value


def steps_below(log, fraction):
    """Steps until a logged training loss is below `fraction` of that before training, or None."""
    (before,) = (float(found[1]) for found in BEFORE_TRAINING.finditer(log))
    for epoch, batch, n_batches, loss in STEP.findall(log):
        if float(loss) < fraction * before:
            return int(epoch) * int(n_batches) + int(batch)
    return None


# -------------------------------------------------------------------------------------- the tables


def tables(results):
    """The Markdown tables that the grid asks for, as strings."""
    return [table(results, wanted) for wanted in results["grid"]["tables"]]


def table(results, wanted):
    """One table: a row for each combination of `rows` that has values."""
    axes, rows, measures = results["grid"]["axes"], wanted["rows"], wanted["measures"]
    axis = wanted.get("columns")
    columns = [{axis: value} for value in wanted.get(axis, list(axes[axis]))] if axis else [{}]
    heads = [
        ": ".join([*column.values(), *[measure] * (len(measures) > 1 or not column)])
        for measure in measures
        for column in columns
    ]
    lines = [f"{wanted['title']}:", "", f"| {' | '.join([*rows, *heads])} |"]
    lines += ["|" + "---|" * (len(rows) + len(heads))]
    for chosen in itertools.product(*(wanted.get(axis, list(axes[axis])) for axis in rows)):
        at = dict(zip(rows, chosen, strict=True))
        cells = [
            in_words(values_at(results, at | column, measure), measure)
            for measure in measures
            for column in columns
        ]
        if any(cells):
            lines.append(f"| {' | '.join([*chosen, *cells])} |")
    return "\n".join([*lines, ""])


def values_at(results, at, measure):
    """The values of a measure in all runs with the settings `at`."""
    wanted = filter(None, map(results["runs"].get, runs(results["grid"])))
    found = [run for run in wanted if at.items() <= run["settings"].items()]
    return [run["values"][measure] for run in found if measure in run["values"]]


def in_words(values, measure):
    """Counts of steps: the median, the worst, how many never; other values: mean and deviation."""
    reached = sorted(value for value in values if value is not None)
    if not values or not (reached or measure.startswith("steps")):
        return ""
    if measure.startswith("steps"):
        never = len(values) - len(reached)
        median = statistics.median_low([*reached, *[float("inf")] * never])
        words = "never" if median == float("inf") else f"{median}"
        if never:
            return words if never == len(values) else f"{words} ({never} of {len(values)} never)"
        return f"{words} ({reached[-1]})" if len(values) > 1 else words
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


if __name__ == "__main__":
    sys.exit(main())
