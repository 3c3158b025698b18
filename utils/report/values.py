"""Numbers of a run, out of its logs and its record, for the report.

Foreign logs may hold anything: what is no finite number is left out.
"""

import math
import re
import statistics

PROBE_SCORE = re.compile(r"(?P<task>.+)_best_val_(?P<score>acc|per)")


# ----------------------------------------------------------------------- numbers from the logs


def number(value, scale=1.0):
    """A finite float from a number, or the mean of a list of them; None from anything else."""
    if isinstance(value, list):
        values = [number(item) for item in value]
        return None if None in values or not values else scale * sum(values) / len(values)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return scale * value if plain and math.isfinite(value) and abs(value) < 1e30 else None


def column(logs, key):
    """[(epoch, value)] of a list in the logs, [] if there is none."""
    values = logs.get(key)
    return list(zip(logs["epoch"], values if isinstance(values, list) else [], strict=False))


def points(logs, key, scale=1.0):
    """[(epoch, number)] of a list in the logs, where it has one."""
    pairs = ((epoch, number(value, scale)) for epoch, value in column(logs, key))
    return [(epoch, value) for epoch, value in pairs if value is not None]


def step_points(logs, key, scale=1.0):
    """`points` of each prediction step."""
    rows = [(epoch, row) for epoch, row in column(logs, key) if isinstance(row, list)]
    n_steps = max((len(row) for _, row in rows), default=0)
    return [
        [
            (epoch, number(row[step], scale))
            for epoch, row in rows
            if step < len(row) and number(row[step]) is not None
        ]
        for step in range(n_steps)
    ]


def before_training(logs, key, scale=1.0):
    """("before training", value) of the validation, or None."""
    values = logs.get("before_training")
    value = number(values.get(key), scale) if isinstance(values, dict) else None
    return None if value is None else ("before training", value)


def probe_scores(logs):
    """(task, score name, its key) of each probe that has found something."""
    matches = [PROBE_SCORE.fullmatch(key) for key in sorted(logs)]
    return [(m["task"], m["score"], m[0]) for m in matches if m and points(logs, m[0])]


def without_accuracies(logs):
    """The logs without accuracies of training and validation, wherever they are in it."""
    if not isinstance(logs, dict):
        return logs
    return {
        key: without_accuracies(value)
        for key, value in logs.items()
        if not key.startswith("locAcc_")
    }


def best_epoch(logs):
    """The first epoch of the highest accuracy or, where there is none, of the lowest loss."""
    scores = points(logs, "locAcc_val") or points(logs, "locLoss_val", -1)
    return max(scores, key=lambda pair: pair[1], default=(None, None))[0]


# --------------------------------------------------------------------- numbers from the record


def windows_per_second(row):
    """Of a row of `RunRecord.epochs`: of all processes together."""
    windows, seconds = number(row.get("windows")), number(row.get("seconds"))
    return windows / seconds if windows is not None and seconds else None


def share_waited(row):
    """Per cent of the training time."""
    waited, seconds = number(row.get("waited")), number(row.get("seconds"))
    return 100 * waited / seconds if waited is not None and seconds else None


def seconds_between_epochs(speeds):
    """The usual time from the end of an epoch to that of the next; None if nothing tells."""
    times = [number(row.get("finished")) for row in speeds]
    steps = [
        later - earlier
        for earlier, later in zip(times, times[1:], strict=False)
        if None not in (earlier, later) and later > earlier
    ]
    return statistics.median(steps) if steps else None
