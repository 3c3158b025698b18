"""The results of a training run in one table: losses, accuracies, probes, and paths of pictures.

    python utils/report/summary.py RUN
    python utils/report/summary.py RUN --untrained PROBE ... --pictures DIR ...

Each PROBE is the output of `eval/linear_separability.py --no_pretraining`: the same probe on the
same network with random weights. The pictures listed are those of the run, of its probes, captures
and stats, and those in each DIR.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils.run.before_torch  # noqa: F401

from utils.files import load_json
from utils.misc import OF_SEGMENTS, UserError, counted, first_few, mean, percent
from utils.report.run_record import RunRecord
from utils.report.values import without_accuracies
from utils.run.command import CommandLine, command
from utils.run.flags import stored_arguments
from utils.stat_specs import picture_directories

UNITS = {  # key of the logs -> title, format
    "units_pnmi": ("PNMI of discrete units", "{:.3f}".format),
    "units_pnmi_by_chance": ("    (by chance)", "{:.3f}".format),
    "units_bitrate_frames": ("bitrate of discrete units, bit/s", "{:.0f}".format),
}


@command
def main(argv=None):
    args = parse_arguments(argv)
    flags, logs = read_run(args.run)
    if not logs["epoch"]:
        raise UserError(f"{args.run}: no epoch is finished yet")
    rows = validation_rows(logs) + probe_rows(logs, untrained_accuracies(args.untrained))
    rows += unit_rows(logs)
    print(f"{'':<38}{'untrained':>12}{'trained':>12}")
    for name, before, after in rows:
        print(f"{name:<38}{before:>12}{after:>12}")
    epochs = RunRecord(args.run).epochs
    if epochs:
        windows, seconds = (sum(epoch[key] for epoch in epochs) for key in ("windows", "seconds"))
        print(f"{counted(len(epochs), 'epoch')}, {windows / seconds:.3g} windows/s in training")
    found = [*pictures_of_run(args.run, flags), *pictures_in(args.untrained + args.pictures)]
    print(f"report, checkpoints and logs: {args.run}{'; pictures:' * bool(found)}")
    for picture in dict.fromkeys(found):
        print(f"    {picture}")


def parse_arguments(argv):
    parser = CommandLine(prog="summary.py", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's --pathCheckpoint")
    parser.add_argument(
        "--untrained", type=Path, nargs="+", default=[], metavar="PROBE",
        help="results of eval/linear_separability.py with --no_pretraining",
    )  # fmt: skip
    parser.add_argument(
        "--pictures", type=Path, nargs="+", default=[], metavar="DIR",
        help="directories whose pictures are listed as well",
    )  # fmt: skip
    return parser.parse_args(argv)


def check_is_run(directory):
    """Raise UserError, naming the runs directly below it, if a directory isn't a run itself."""
    record = "checkpoint_args.json"
    if (directory / record).exists():
        return
    below = sorted(str(path.parent) for path in directory.glob(f"*/{record}"))
    advice = f"choose one below it: {first_few(below)}" if below else "give its --pathCheckpoint"
    raise UserError(f"{directory}: there is no run in it, or no checkpoint of one yet; {advice}")


def read_run(directory):
    """The flags of a run, as they are stored, and its logs: two dicts.

    Raises UserError if there is no run in the directory, or its files are damaged.
    """
    check_is_run(directory)
    flags, logs = (load_json(directory / f"checkpoint_{name}.json") for name in ("args", "logs"))
    epochs = logs.get("epoch") if isinstance(flags, dict) and isinstance(logs, dict) else None
    if not isinstance(epochs, list) or not all(type(epoch) is int for epoch in epochs):
        raise UserError(f"{directory}: its checkpoint_args.json or checkpoint_logs.json is damaged")
    stored = stored_arguments(flags, directory)
    if stored.supervised and stored.CTC:
        logs = without_accuracies(logs)  # CTC has none, and logs zeros
    return flags, logs


def pictures_of_run(run, flags):
    """The pictures in a run's directory and in those named by its flags (a dict)."""
    yield from pictures_in([run])
    for flag, pattern in (
        ("linsep_logs_dir", "*/*/[!.]*.png"),
        ("pathCaptureSave", "*/pictures/[!.]*.png"),
    ):
        if flags.get(flag):
            yield from sorted(as_seen_from_here(flags[flag]).glob(pattern))
    stats = picture_directories(flags.get("captureSetStats") or "")
    yield from pictures_in(map(as_seen_from_here, stats))


def pictures_in(directories):
    for directory in directories:
        yield from sorted(directory.glob("[!.]*.png"))  # not the `._name.png` of a Mac


def as_seen_from_here(path):
    """The path, relative if it is below the working directory."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def validation_rows(logs):
    """(name, value before training, value after the last epoch) of the logged metrics."""
    before = logs.get("before_training", {})
    rows = []
    for name, key, form in (
        ("validation loss", "locLoss_val", "{:.3f}".format),
        ("validation accuracy", "locAcc_val", percent),
        ("validation loss of segments", "locLoss_val" + OF_SEGMENTS, "{:.3f}".format),
        ("validation accuracy of segments", "locAcc_val" + OF_SEGMENTS, percent),
    ):
        if key in logs:
            values = before.get(key), logs[key][-1]
            rows.append((name, *(form(mean(value)) if value else "-" for value in values)))
    return rows


def untrained_accuracies(directories):
    """Task -> best validation accuracy of each probe on random weights.

    Raises UserError for other results.
    """
    accuracies = {}
    for directory in directories:
        flags = load_json(directory / "checkpoint_args.json")
        if not flags.get("no_pretraining"):
            raise UserError(
                f"--untrained {directory}: isn't a probe of random weights; make one with "
                "eval/linear_separability.py --no_pretraining"
            )
        task = "phone" if flags["pathPhone"] else "speaker"
        logs = load_json(directory / "checkpoint_logs.json")
        accuracies[task] = max(mean(row) for row in logs["locAcc_val"])
    return accuracies


def probe_rows(logs, untrained):
    rows = []
    for task in ("phone", "speaker"):
        found = [value[0] for value in logs.get(f"{task}_best_val_acc", []) if value]
        if not found:
            continue
        majority = [value[0] for value in logs[f"{task}_baseline_val_acc"] if value][-1]
        before = percent(untrained[task]) if task in untrained else "-"
        rows.append((f"{task} accuracy of a linear probe", before, percent(found[-1])))
        rows.append((f"    (majority {task})", percent(majority), percent(majority)))
    return rows


def unit_rows(logs):
    """Of the last epoch with --unit_quality_each_epochs; PNMI only if phones are known."""
    last = {key: [v for v in logs.get(key, []) if v is not None][-1:] for key in UNITS}
    return [(UNITS[key][0], "-", UNITS[key][1](*value)) for key, value in last.items() if value]


if __name__ == "__main__":
    sys.exit(main())
