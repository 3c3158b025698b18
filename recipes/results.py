"""The results of recipes side by side: probes, ABX, units and boundaries, in %.

    python recipes/results.py runs/librispeech/*/results_200

Each folder is a `results_N` of a recipe. In brackets: the majority class of probes, the same units
shifted in time, evenly spaced boundaries.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.run.before_torch  # noqa: F401

from utils.files import load_json
from utils.misc import UserError
from utils.run.command import CommandLine, command


@command
def main(argv=None):
    parser = CommandLine(prog="results.py", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders results_N of recipes")
    folders = parser.parse_args(argv).folders
    columns = [dict(figures(folder)) for folder in folders]
    for folder, column in zip(folders, columns, strict=True):
        if not column:
            raise UserError(f"{folder}: holds no results of a recipe")
    names = [folder.resolve().parent.name for folder in folders]
    if len({*names}) < len(names):
        names = [f"{name}/{folder.name}" for name, folder in zip(names, folders, strict=True)]
    titles = list(dict.fromkeys(title for column in columns for title in column))
    lines = [[title, *(column.get(title, "-") for column in columns)] for title in titles]
    widths = [max(map(len, cells)) for cells in zip(["", *names], *lines, strict=True)]
    for first, *cells in [["", *names], *lines]:
        print(first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)))


def figures(folder):
    """Yield (title, text) of each figure in a folder of results."""
    for task in ("phone", "speaker"):
        for logs in contents(folder, f"{task}/checkpoint_logs.json"):
            yield f"{task} probe", figure(logs.get("best_val_acc"), logs.get("baseline_val_acc"))
    for scores in contents(folder, "abx/ABX_scores.json"):
        for kind in ("within", "across"):
            if kind in scores:
                yield f"ABX error {kind} speakers", figure(scores[kind])
    for quality in contents(folder, "units_*/unit_quality.json"):
        for key, title in (("pnmi", "PNMI"), ("phone_purity", "phone purity")):
            measured, chance = (
                quality[part]["frames_without_silence"][key] for part in ("measures", "chance")
            )
            yield f"units: {title}", figure(measured, chance)
    for found in sorted(folder.glob("segmentation-*/segmentation.json")):
        measured = load_json(found)["phone"]["strict"]
        for key, title in (("f1", "F1"), ("r_value", "R-value")):
            name = found.parent.name.removeprefix("segmentation-")
            yield (
                f"boundaries, {name}: {title}",
                figure(measured[key], measured["chance"]["as_many"][key]),
            )


def contents(folder, pattern):
    return map(load_json, sorted(folder.glob(pattern)))


def figure(value, chance=None):
    text = "-" if value is None else f"{100 * value:.1f}"
    return text if chance is None else f"{text} ({100 * chance:.1f})"


if __name__ == "__main__":
    sys.exit(main())
