"""Numbers for the report, from the logs of a run and from its record.

Logs may hold anything: whatever isn't a finite number is left out.
"""

import math
import re
import statistics

from utils.report.line_chart import Level

NEAREST = re.compile(r"(?P<task>.+)_knn_(?P<k>\d+)_val_acc")
PROBE_METRIC = re.compile(r"(?P<task>.+)_best_val_(?P<metric>acc|per)")


# ----------------------------------------------------------------------- numbers from the logs


def number(value, scale=1.0):
    """A number as a finite float, a list of them as their mean; None for anything else."""
    if isinstance(value, list):
        values = [number(item) for item in value]
        return None if None in values or not values else scale * sum(values) / len(values)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return scale * value if plain and math.isfinite(value) and abs(value) < 1e30 else None


def column(logs, key):
    """[(epoch, value)] of a list in the logs; [] if it is missing."""
    values = logs.get(key)
    return list(zip(logs["epoch"], values if isinstance(values, list) else [], strict=False))


def points(logs, key, scale=1.0):
    """[(epoch, number)] of a list in the logs, without epochs that have no number."""
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
    """The validation before training as a Level, or None."""
    values = logs.get("before_training")
    value = number(values.get(key), scale) if isinstance(values, dict) else None
    return None if value is None else Level("before training", value)


def probe_metrics(logs):
    """(task, metric, key in the logs) of each probe that has results."""
    matches = [PROBE_METRIC.fullmatch(key) for key in sorted(logs)]
    return [(m["task"], m["metric"], m[0]) for m in matches if m and points(logs, m[0])]


def nearest_metrics(logs):
    """(task, number of neighbours, key in the logs) of each probe by nearest neighbours."""
    matches = [NEAREST.fullmatch(key) for key in sorted(logs)]
    return [(m["task"], m["k"], m[0]) for m in matches if m and points(logs, m[0])]


def without_accuracies(logs):
    """The logs without accuracies of training and validation, at any depth."""
    if not isinstance(logs, dict):
        return logs
    return {
        key: without_accuracies(value)
        for key, value in logs.items()
        if not key.startswith("locAcc_")
    }


def best_epoch(logs):
    """The first epoch with the highest accuracy or, without accuracies, the lowest loss."""
    candidates = points(logs, "locAcc_val") or points(logs, "locLoss_val", -1)
    return max(candidates, key=lambda pair: pair[1], default=(None, None))[0]


# --------------------------------------------------------------------- numbers from the record


def windows_per_second(row):
    """From a row of `RunRecord.epochs`; over all processes."""
    windows, seconds = number(row.get("windows")), number(row.get("seconds"))
    return windows / seconds if windows is not None and seconds else None


def percent_waited(row):
    """Percentage of the training time spent waiting for data."""
    waited, seconds = number(row.get("waited")), number(row.get("seconds"))
    return 100 * waited / seconds if waited is not None and seconds else None


def seconds_between_epochs(speeds):
    """The median time from the end of one epoch to the end of the next; None if unknown."""
    times = [number(row.get("finished")) for row in speeds]
    steps = [
        later - earlier
        for earlier, later in zip(times, times[1:], strict=False)
        if None not in (earlier, later) and later > earlier
    ]
    return statistics.median(steps) if steps else None
