"""Several training runs side by side: results, curves, speed, and flags that differ.

    python utils/report/compare.py runs/cpc runs/acpc --out comparison.html

Prints a table of the results and writes a page that needs no network. Runs may differ in length,
criterion and corpus, may still be training, and may be runs of the original program, which recorded
no speed.
"""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils.run.before_torch  # noqa: F401

from utils.files import write_lines, writing_to
from utils.misc import BOUNDARY_RATE, OF_SEGMENTS, UserError, first_few
from utils.report.elements import (
    chart,
    charts,
    duration,
    memory,
    percentage,
    shown,
    soft,
    table,
    three_decimals,
)
from utils.report.line_chart import Level, Line
from utils.report.markup import tag
from utils.report.page import of_epochs, whole_page
from utils.report.run_record import RunRecord
from utils.report.sections import METRICS, flag_value, keys_of_stats
from utils.report.summary import read_run
from utils.report.values import (
    nearest_metrics,
    number,
    percent_waited,
    points,
    probe_metrics,
    windows_per_second,
)
from utils.run.command import CommandLine, command
from utils.run.flags import CONTRASTIVE_ONLY, CPCCTC_ONLY, build_parser

N_COLORS = 8  # in page.css; further runs have the same ones, dashed
LONGEST_NAME = 24  # in the printed table, from its end
# Where results go: never the same for two runs.
PLACES = {"pathCheckpoint", "pathCaptureSave", "linsep_logs_dir", "linsep_checkpoint_dir"}
TRAINING = {  # title -> key in the logs, scale
    "Validation loss": ("locLoss_val",),
    "Training loss": ("locLoss_train",),
    "Validation accuracy (%)": ("locAcc_val", 100),
    "Training accuracy (%)": ("locAcc_train", 100),
    "Validation loss of segments": ("locLoss_val" + OF_SEGMENTS,),
    "Validation accuracy of segments (%)": ("locAcc_val" + OF_SEGMENTS, 100),
    "Boundaries per second": (BOUNDARY_RATE + "_val",),
    "Learning rate": ("learningRate",),
    "Norm of the gradient": ("gradNorm_train",),
}
CRITERION = CONTRASTIVE_ONLY | CPCCTC_ONLY | {"CPCCTC", "supervised"}


class Run(NamedTuple):
    """A run: flags and logs are dicts, epochs the rows of its RunRecord that are in the logs."""

    name: str
    directory: Path
    flags: dict
    logs: dict
    record: RunRecord
    epochs: list

    @property
    def progress(self):
        return f"{len(self.logs['epoch'])} of {self.flags['nEpoch']}"

    def recorded(self, key):
        """The numbers of a key in the record, epoch by epoch."""
        return [value for row in self.epochs if (value := number(row.get(key))) is not None]


@command
def main(argv=None):
    args = parse_arguments(argv)
    names = short_names([path.resolve() for path in args.runs])
    runs = [open_run(path, name) for path, name in zip(args.runs, names, strict=True)]
    print_rows(runs, [*result_rows(runs), *speed_rows(runs)])
    with writing_to(args.out, "--out"):
        write_lines(args.out, [comparison(runs)])
    print(f"curves, and flags that differ: {args.out}")


def parse_arguments(argv):
    parser = CommandLine(prog="compare.py", description=__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="a run's --pathCheckpoint; two or more")
    add("--out", default="comparison.html", metavar="FILE", help="the page to write")
    args = parser.parse_args(argv)
    if len({path.resolve() for path in args.runs}) < max(2, len(args.runs)):
        raise UserError(f"{first_few(map(str, args.runs))}: give two or more different runs")
    return args


def short_names(places):
    """The names of the directories or, where two are the same, their paths below a common one."""
    if len({place.name for place in places}) == len(places):
        return [place.name for place in places]
    common = os.path.commonpath([place.parent for place in places])
    return [str(place.relative_to(common)) for place in places]


def open_run(directory, name):
    """The Run in a directory. Raises UserError if there is none."""
    stored, logs = read_run(directory)
    defaults = vars(build_parser().parse_args([])) | {"initialisation": "original"}
    record = RunRecord(directory)
    return Run(name, directory, defaults | stored, logs, record, of_epochs(record.epochs, logs))


# -------------------------------------------------------------------------------------- tables


def result_rows(runs):
    """(title, a text or None for each run): latest and best values, with their epochs."""
    yield "epochs", [run.progress for run in runs]
    yield from metric_rows(runs, "validation loss", "locLoss_val", 1, three_decimals, min)
    yield "  chance", [three_decimals(run.record.chance.loss) for run in runs]
    yield from metric_rows(runs, "validation accuracy", "locAcc_val", 100, percentage, max)
    yield "  chance", [percentage(number(run.record.chance.accuracy, 100)) for run in runs]
    loss, accuracy = (f"loc{kind}_val{OF_SEGMENTS}" for kind in ("Loss", "Acc"))
    yield from metric_rows(runs, "loss of segments", loss, 1, three_decimals, min)
    yield from metric_rows(runs, "accuracy of segments", accuracy, 100, percentage, max)
    for task, metric, key in in_any(runs, probe_metrics):
        title, choose = f"{task} probe: {METRICS[metric]}", min if metric == "per" else max
        yield from metric_rows(runs, title, key, 100, percentage, choose)
        yield "  standard deviation", [percentage(latest(run, f"{key}_std")) for run in runs]
        yield f"  majority {task}", [percentage(majority(run, task, metric)) for run in runs]
    for task, k, key in in_any(runs, nearest_metrics):
        yield from metric_rows(runs, f"{task}, {k} nearest: accuracy", key, 100, percentage, max)
    for key in in_any(runs, keys_of_stats):
        yield key.replace("_", " "), [at_epoch(points(run.logs, key)[-1:], shown) for run in runs]


def metric_rows(runs, title, key, scale, show, choose):
    """A row of the latest values and one of the best, which `choose` (min or max) finds."""
    values = [points(run.logs, key, scale) for run in runs]
    best = [[choose(pairs, key=lambda pair: pair[1])] if pairs else [] for pairs in values]
    yield title, [at_epoch(pairs[-1:], show) for pairs in values]
    yield "  best", [at_epoch(pairs, show) for pairs in best]


def at_epoch(pairs, show):
    """The value of [(epoch, value)] with its epoch; None for an empty list."""
    return f"{show(pairs[0][1])} ({pairs[0][0]})" if pairs else None


def latest(run, key):
    """The latest value of a key in the logs, in percent, or None."""
    values = points(run.logs, key, 100)
    return values[-1][1] if values else None


def majority(run, task, metric):
    """What always naming the majority class scores, in percent, or None."""
    return latest(run, f"{task}_baseline_val_{metric}")


def in_any(runs, find):
    """What `find` finds in the logs of the runs, without repetitions."""
    return list(dict.fromkeys(item for run in runs for item in find(run.logs)))


def speed_rows(runs):
    """(title, a text or None for each run)."""
    keys = ("windows", "seconds", "waited")
    totals = [{key: sum(run.recorded(key)) for key in keys} for run in runs]
    yield "windows/s in training", [shown(windows_per_second(row)) for row in totals]
    yield "training time", [duration(row["seconds"]) if row["seconds"] else None for row in totals]
    yield "data wait", [percentage(percent_waited(row)) for row in totals]
    for title, key in (("peak memory", "memory"), ("peak GPU memory", "gpu_memory")):
        peaks = [max(run.recorded(key), default=None) for run in runs]
        yield title, [peak and memory(peak) for peak in peaks]


def print_rows(runs, rows):
    names = [run.name[-LONGEST_NAME:] for run in runs]
    for title, cells in [("", names), *rows]:
        if any(cells):
            columns = zip(names, cells, strict=True)
            texts = (f"{cell or '-':>{max(16, len(name) + 2)}}" for name, cell in columns)
            print(f"{title:<34}" + "".join(texts))


# ---------------------------------------------------------------------------------------- page


def comparison(runs):
    """The page, as Markup."""
    title = f"Comparison of {len(runs)} runs"
    made = soft(time.strftime("Compared on %Y-%m-%d at %H:%M (%Z)."))
    sections = {
        "Results": results_section(runs),
        "Training": [charts(*(curves(name, runs, *key) for name, key in TRAINING.items()))],
        "Probes, stats, units": [charts(*probe_charts(runs), *stat_charts(runs)) or soft("None.")],
        "Speed and memory": speed_section(runs),
        "Flags that differ": flags_section(runs),
    }
    return whole_page(title, tag("header", tag("h1", title), made), sections)


def results_section(runs):
    yield table_of(runs, result_rows(runs))
    if CRITERION & {name for name, _ in differing_flags(runs)}:
        yield soft("The criteria differ, and with them the scales of losses and accuracies.")
    yield soft("In brackets: the epoch. Probes compare where labels, lists and probe flags agree.")
    for run in runs:
        machines = dict.fromkeys(row["machine"] for row in run.epochs)
        yield soft(f"{run.name}: ", tag("code", run.directory), *(f"; {m}" for m in machines))


def table_of(runs, rows):
    rows = [[title, *cells] for title, cells in rows if any(cells)]
    return table(["", *(run.name for run in runs)], rows) if rows else soft("Nothing recorded.")


def curves(title, runs, key, scale=1.0, levels=()):
    """A chart of a value in the logs, with a line for each run."""
    return run_chart(title, runs, [points(run.logs, key, scale) for run in runs], levels)


def run_chart(title, runs, values, levels=()):
    """values: [(epoch, value)] of each run."""
    kinds = [f"run{i % N_COLORS}{' dashed' * (i >= N_COLORS)}" for i in range(len(runs))]
    names = [run.name for run in runs]
    return chart(title, list(map(Line, names, values, kinds)), levels)


def probe_charts(runs):
    for task, metric, key in in_any(runs, probe_metrics):
        known = {majority(run, task, metric) for run in runs} - {None}
        levels = [Level(f"majority {task}", *known)] if len(known) == 1 else []
        title = f"{task.capitalize()} probe: {METRICS[metric]} (%)"
        yield curves(title, runs, key, 100, levels)
    for task, k, key in in_any(runs, nearest_metrics):
        yield curves(f"{task.capitalize()}, {k} nearest: accuracy (%)", runs, key, 100)


def stat_charts(runs):
    return (curves(key.replace("_", " "), runs, key) for key in in_any(runs, keys_of_stats))


def speed_section(runs):
    yield table_of(runs, speed_rows(runs))
    speeds = ([(row["epoch"], windows_per_second(row)) for row in run.epochs] for run in runs)
    known = [[pair for pair in pairs if pair[1] is not None] for pairs in speeds]
    yield charts(run_chart("Windows/s in training", runs, known))


def flags_section(runs):
    rows = [
        [tag("code", f"--{name}"), *(tag("code", flag_value(value)) for value in values)]
        for name, values in differing_flags(runs)
    ]
    yield table(["flag", *(run.name for run in runs)], rows, "values") if rows else soft("None.")


def differing_flags(runs):
    """(name, values) of the flags that aren't the same in all runs, in the order of --help."""
    for name in dict.fromkeys(name for run in runs for name in run.flags if name not in PLACES):
        values = [run.flags.get(name) for run in runs]
        if any(value != values[0] for value in values):
            yield name, values


if __name__ == "__main__":
    sys.exit(main())
