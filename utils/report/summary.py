"""What a training run came to, in one table: losses, accuracies, probes and where to look.

    python utils/report/summary.py RUN
    python utils/report/summary.py RUN --untrained PROBE ...

Each PROBE is what `eval/linear_separability.py --no_pretraining` wrote: the same probe on the same
network with random weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.files import load_json
from utils.logs import mean, percent
from utils.misc import CommandLine, UserError, command
from utils.report.run_record import RunRecord


@command
def main(argv=None):
    parser = CommandLine(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's --pathCheckpoint")
    parser.add_argument(
        "--untrained", type=Path, nargs="+", default=[], metavar="PROBE",
        help="results of eval/linear_separability.py with --no_pretraining",
    )  # fmt: skip
    args = parser.parse_args(argv)
    logs = load_json(args.run / "checkpoint_logs.json")
    if not logs.get("epoch"):
        raise UserError(f"{args.run}: no epoch is finished yet")
    rows = validation_rows(logs) + probe_rows(logs, untrained_scores(args.untrained))
    print(f"{'':<38}{'untrained':>12}{'trained':>12}")
    for name, before, after in rows:
        print(f"{name:<38}{before:>12}{after:>12}")
    epochs = RunRecord(args.run).epochs
    if epochs:
        windows, seconds = (sum(epoch[key] for epoch in epochs) for key in ("windows", "seconds"))
        print(f"{len(epochs)} epochs, {windows / seconds:.3g} windows/s in training")
    print(f"report, checkpoints and logs: {args.run}; pictures:")
    for picture in sorted(args.run.parent.rglob("*.png")):
        print(f"    {picture}")


def validation_rows(logs):
    """Name, value before training, value of the last epoch."""
    before = logs.get("before_training", {})
    rows = []
    for name, key, form in (
        ("validation loss", "locLoss_val", "{:.3f}".format),
        ("validation accuracy", "locAcc_val", percent),
    ):
        start = form(mean(before[key])) if key in before else "-"
        rows.append((name, start, form(mean(logs[key][-1]))))
    return rows


def untrained_scores(directories):
    """Task -> best validation accuracy of each probe on random weights."""
    scores = {}
    for directory in directories:
        task = "phone" if load_json(directory / "checkpoint_args.json")["pathPhone"] else "speaker"
        logs = load_json(directory / "checkpoint_logs.json")
        scores[task] = max(mean(row) for row in logs["locAcc_val"])
    return scores


def probe_rows(logs, untrained):
    rows = []
    for task in ("phone", "speaker"):
        found = [value[0] for value in logs.get(f"{task}_best_val_acc", []) if value]
        if not found:
            continue
        guess = [value[0] for value in logs[f"{task}_baseline_val_acc"] if value][-1]
        before = percent(untrained[task]) if task in untrained else "-"
        rows.append((f"{task}s told apart by a linear probe", before, percent(found[-1])))
        rows.append((f"    (always the commonest {task})", percent(guess), percent(guess)))
    return rows


if __name__ == "__main__":
    sys.exit(main())
