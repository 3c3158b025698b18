"""Checks that the parts of a checkpoint are plausible, before they are used.

A damaged or foreign file is refused with the name of the part, instead of failing somewhere inside
the run.
"""

import math

import torch

from utils.misc import OF_SEGMENTS, UserError
from utils.run.flags import stored_arguments
from utils.run.level_flags import further_losses

ROW_SERIES = ("locLoss_train", "locAcc_train", "locLoss_val", "locAcc_val")  # by prediction step
LEVELS = ("", OF_SEGMENTS)  # suffixes of their names; a single level has only the first
NUMBER_SERIES = ("iter", "learningRate", "gradNorm_train")
NUMBER = float | int


def check_types(path, state):
    """Raise UserError unless the parts that every use of a checkpoint needs have their types."""
    sound = {
        "format": isinstance(state["format"], int),
        "gEncoder": all(isinstance(key, str) for key in state["gEncoder"]),
        "cpcCriterion": isinstance(state.get("cpcCriterion"), dict),
        "args": isinstance(state.get("args"), dict),
        "logs": are_logs(state.get("logs")),
        "position": _is_list(state.get("position"), int, 3) and min(state["position"]) >= 0,
        "models": _is_list(state.get("models", []), dict),
        "speakers": _is_list(state.get("speakers", []), str),
    }
    if damaged := _unsound(sound):
        raise UserError(
            f"{path}: damaged: parts of the checkpoint are missing or of a wrong type ({damaged})"
        )


def check_resumable(checkpoint, weights):
    """Raise UserError, naming what is damaged, unless training can resume from this checkpoint.

    `weights`: the state dict of the model that is resumed. The optimiser's state and the hidden
    state are checked where they are loaded.
    """
    state, best = checkpoint.state, checkpoint.state.get("best")
    sound = {
        "optimizer": isinstance(state.get("optimizer"), dict),
        "best": best is None or _same_shapes(best, weights),
    }
    if not checkpoint.of_original:
        further = len(further_losses(stored_arguments(state["args"], checkpoint.path)))
        machine, logs_are_sound = state.get("machine"), are_training_logs(state["logs"])
        sound |= {
            "logs": logs_are_sound,
            "best_accuracy": _is_number(state.get("best_accuracy")),
            "hidden": "hidden" in state,
            "fingerprint": isinstance(state.get("fingerprint"), str),
            "machine": isinstance(machine, dict) and all(map(_is_plain, machine.values())),
            "clock": "clock" not in state or _is_clock(state["clock"]),
            "running": logs_are_sound
            and _are_epoch_means(state.get("running"), state["position"], state["logs"], further),
        }
    if damaged := _unsound(sound):
        raise UserError(
            f"{checkpoint.path}: training can't resume from it: {damaged}: missing or damaged (to "
            "start from its weights, use --load)"
        )


def _unsound(sound):
    return ", ".join(name for name, is_sound in sound.items() if not is_sound)


def _is_list(value, kind, length=None):
    """Whether a value is a list of items of this kind and, if given, of this length."""
    return (
        isinstance(value, list)
        and all(isinstance(item, kind) for item in value)
        and length in (None, len(value))
    )


def _is_plain(value):
    return value is None or isinstance(value, str | NUMBER)


def _is_number(value):
    return isinstance(value, NUMBER) and not math.isnan(value)


def _same_shapes(state, weights):
    return (
        isinstance(state, dict)
        and state.keys() == weights.keys()
        and all(torch.is_tensor(v) and v.shape == weights[key].shape for key, v in state.items())
    )


def _is_clock(value):
    """Whether this can be the `state` of a Clock (utils/run/logs.py)."""
    return (
        isinstance(value, dict)
        and value.keys() == {"seconds", "waited", "windows"}
        and all(_is_number(n) and 0 <= n < math.inf for n in value.values())
    )


def are_logs(logs):
    """Whether these can be `checkpoint_logs.json`: lists that cover the same epochs."""
    if not isinstance(logs, dict) or not isinstance(logs.get("epoch", []), list):
        return False
    lists = [series for series in logs.values() if isinstance(series, list)]
    return all(len(series) == len(logs.get("epoch", [])) for series in lists)


def are_training_logs(logs):
    """Whether these logs, whose lists cover the same epochs, can be those of a training run."""
    series = {key: value for key, value in logs.items() if isinstance(value, list)}
    before = logs.get("before_training", {})
    if not isinstance(before, dict):
        return False
    settings = {k: v for k, v in logs.items() if k not in {*series, "before_training"}}
    levels = LEVELS[: 1 + any(key.endswith(OF_SEGMENTS) for key in (*series, *before))]
    names = {f"{key}{level}" for key in ROW_SERIES for level in levels}
    of_validation = {name for name in names if "_val" in name}
    return (
        ("before_training" not in logs or before.keys() >= of_validation)
        and all(_can_be_logged(key, value) for key, value in before.items())
        and all(map(_is_plain, settings.values()))
        and not settings.keys() & {*names, *NUMBER_SERIES}
        and (not series.get("epoch") or series.keys() >= names)
        and all(isinstance(epoch, int) for epoch in series.get("epoch", []))
        and all(_can_be_logged(key, value) for key, values in series.items() for value in values)
        and all(_is_row(row) for level in levels for row in _rows(logs, level))
        and all(len(set(map(len, _rows(logs, level)))) <= 1 for level in levels)
    )


def _rows(logs, level):
    """The losses and accuracies by prediction step of a level, in the logs of a training run;
    without those of epochs in which validation had no segments to predict."""
    before = logs.get("before_training", {})
    first = [before[f"{key}{level}"] for key in ROW_SERIES if f"{key}{level}" in before]
    rows = first + [row for key in ROW_SERIES for row in logs.get(f"{key}{level}", [])]
    return [row for row in rows if not level or row is not None]


def _is_row(value):
    """Whether this can be an epoch's values of each prediction step, or of each probe."""
    return _is_list(value, NUMBER) and bool(value)


def _can_be_logged(key, value):
    """Whether this can be an epoch's value in the logs; None stands for a missing one."""
    is_number = value is None or isinstance(value, NUMBER)
    return is_number or (_is_row(value) and key not in NUMBER_SERIES)


def _are_epoch_means(running, position, logs, n_further):
    """Whether these can be the RunningMeans (utils/run/logs.py) of an epoch at `position`.

    n_further: number of losses beside those of the levels
    """
    if not isinstance(running, dict) or not running.keys() >= {"sums", "norms"}:
        return False
    counts = [running.get("windows"), running.get("batches")]
    if not _is_list(counts, int) or min(counts) < 0:
        return False
    (windows, batches), sums, norms = counts, running["sums"], running["norms"]
    if position[1:] == [0, 0]:  # between epochs there are none
        return not batches and _is_number(sums) and _is_number(norms)
    of_levels = [rows[0] for level in LEVELS if (rows := _rows(logs, level))]
    n_known, before = sum(map(len, of_levels)) + n_further, logs.get("before_training", {})
    unknown = not logs.get("epoch") and None in before.values()  # the number of those of segments
    return (
        windows >= batches > 0
        and torch.is_tensor(sums)
        and torch.is_tensor(norms)
        and sums.ndim == len(sums) == 2
        and (sums.size(1) > n_known if unknown else sums.size(1) == n_known)
        and norms.ndim == 0
        and sums.is_floating_point()
        and norms.is_floating_point()
    )
