"""Checkpoint files: finding, reading and writing them.

A run's directory holds

- `checkpoint_<epoch>.pt`, written after an epoch. The original program's keys: `gEncoder` (state of
  the whole CPC model), `cpcCriterion`, `optimizer`, `best` (state of the best model so far). Ours
  besides: `args`, `logs`, `position` (where training goes on), `running` (sums of the epoch in
  progress), `best_accuracy`, `hidden` (kept hidden state), `fingerprint` (of the corpus),
  `machine`, `models` (flags of each part of a model that began with `--load`), `speakers` (by
  number, where the criterion has weights for each of them) and `format`;
- `checkpoint_resume.pt`, the same inside an epoch, newer than every other or absent. It has a
  `clock` besides: what of the epoch's time and windows is done;
- `checkpoint_args.json` and `checkpoint_logs.json`, copies of `args` and `logs` for people and for
  the original program. They are read only beside a checkpoint of the original.

All of it loads with `torch.load(..., weights_only=True)`.
"""

import argparse
import contextlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.files import load_json, load_tensors, remove_leftovers, save_json, save_tensors
from utils.misc import UserError, first_few

FORMAT = 1  # of our additions to the original's keys
RESUME_NAME = "checkpoint_resume.pt"
ROW_SERIES = ("locLoss_train", "locAcc_train", "locLoss_val", "locAcc_val")  # by prediction step
NUMBER_SERIES = ("iter", "learningRate", "gradNorm_train")
NUMBERED_NAME = re.compile(r"checkpoint_(\d+)\.pt")


@dataclass
class Checkpoint:
    """What a checkpoint file holds, completed where another program wrote it.

    `of_original` says so: the original program, its parent CPC_audio, or a published model.
    """

    path: Path
    state: dict
    of_original: bool = False

    @property
    def epoch(self):
        """The epoch (from 0) that the weights belong to: the last in which they were trained."""
        epoch, pack, batch = self.state["position"]
        return epoch if (pack, batch) != (0, 0) else epoch - 1


def numbered_checkpoints(directory):
    """(epoch, path) of the checkpoints in a directory, the earliest first."""
    matches = ((NUMBERED_NAME.fullmatch(p.name), p) for p in Path(directory).glob("*.pt"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def saved_checkpoints(directory):
    """Paths of all checkpoints in a directory, the one inside an epoch included."""
    resume = Path(directory, RESUME_NAME)
    return [path for _, path in numbered_checkpoints(directory)] + [resume] * resume.is_file()


def open_checkpoint(path):
    """The checkpoint in the file `path`, or the newest readable one of the directory `path`.

    Raises UserError if there is none, or none that can be read.
    """
    path = Path(path)
    if path.is_file():
        return read_checkpoint(path)
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise UserError(
            f"{path}: no checkpoint there (checkpoint_<epoch>.pt)"
            if path.is_dir()
            else f"{path}: no such directory or file"
        )
    return checkpoint


def newest_checkpoint(directory):
    """The newest readable checkpoint of a run's directory; None if it has none at all.

    Unreadable ones are named on the way. Raises UserError if all are unreadable, so that a run is
    never silently begun anew over what may be saved yet.
    """
    directory = Path(directory)
    numbered = numbered_checkpoints(directory)
    failures = []

    def readable(path):
        try:
            return read_checkpoint(path)
        except UserError as error:
            failures.append(str(error))
            print(f"warning: {error}")
            return None

    resume = directory / RESUME_NAME
    within_epoch = readable(resume) if resume.is_file() else None
    while numbered and (
        within_epoch is None or tuple(within_epoch.state["position"]) < (numbered[-1][0] + 1, 0, 0)
    ):
        _, path = numbered.pop()
        checkpoint = readable(path)
        if checkpoint:
            return checkpoint
    if within_epoch is None and failures:
        raise UserError(
            f"{directory}: no checkpoint there can be read ({failures[0]}); give back an intact "
            "one, or begin anew with --restart"
        )
    return within_epoch


def remove_stale(directory, source):
    """Delete what a killed run left behind: parts of files, and an older `checkpoint_resume.pt`.

    source: the Checkpoint that is gone on from, or None; older is what it was preferred to.
    """
    remove_leftovers(directory)
    if source and source.path.name != RESUME_NAME:
        with contextlib.suppress(OSError):
            Path(directory, RESUME_NAME).unlink()


def read_checkpoint(path):
    """Read a checkpoint of this program, of the original, or a published model.

    The parent of the original, CPC_audio, writes the same files; flags that aren't known here are
    left out and missing ones have their defaults (utils/run/flags.py). A published model is one
    file of `config` and `weights`. Raises UserError if the file is none of these.
    """
    path = Path(path)
    state = load_tensors(path)
    of_original = isinstance(state, dict) and "format" not in state
    if of_original and {"config", "weights"} <= state.keys():
        state = _complete_published(state)
    if not isinstance(state, dict) or not isinstance(state.get("gEncoder"), dict):
        raise UserError(
            f"{path}: isn't a CPC checkpoint (it has neither `gEncoder` nor `config` and `weights`)"
        )
    if "format" not in state:
        _complete_original(path, state)
    if isinstance(state["format"], int) and state["format"] != FORMAT:
        raise UserError(
            f"{path}: written by a newer version of this program (format {state['format']})"
        )
    _check_types(path, state)
    return Checkpoint(path, state, of_original)


def _complete_published(state):
    """The parts of a checkpoint that a published model has; it has no criterion.

    How long it was trained isn't known: it counts as one epoch.
    """
    config = state["config"]
    return {
        "format": FORMAT,
        "gEncoder": state["weights"],
        "cpcCriterion": {},
        "optimizer": {},
        "best": None,
        "args": vars(config) if isinstance(config, argparse.Namespace) else config,
        "logs": {},
        "position": [1, 0, 0],
    }


def _complete_original(path, state):
    """Fill in what the original program keeps in the JSON files beside a checkpoint."""
    match = NUMBERED_NAME.fullmatch(path.name)
    arguments = path.parent / "checkpoint_args.json"
    if not arguments.is_file():
        raise UserError(f"{path}: checkpoint_args.json is missing beside it")
    state["format"] = FORMAT
    state["args"] = load_json(arguments)
    state["logs"] = {}
    with contextlib.suppress(UserError):  # its logs are welcome, not needed
        state["logs"] = load_json(path.parent / "checkpoint_logs.json")
    done = int(match[1]) + 1 if match else 1
    logs = state["logs"]
    if not (_are_logs(logs) and _are_training_logs(logs)) or len(logs.get("epoch", [])) < done:
        state["logs"] = {}
    state["logs"] = {
        key: value[:done] if isinstance(value, list) else value
        for key, value in state["logs"].items()
    }
    state["position"] = [done, 0, 0]


def _check_types(path, state):
    """Refuse a file whose parts can't be what they are called, before they are used."""
    position = state.get("position")
    sound = (
        isinstance(state["format"], int)
        and all(isinstance(key, str) for key in state["gEncoder"])
        and isinstance(state.get("cpcCriterion"), dict)
        and isinstance(state.get("args"), dict)
        and _are_logs(state.get("logs"))
        and isinstance(position, list)
        and len(position) == 3
        and all(isinstance(number, int) and number >= 0 for number in position)
        and isinstance(state.get("models", []), list)
        and all(isinstance(flags, dict) for flags in state.get("models", []))
        and isinstance(state.get("speakers", []), list)
        and all(isinstance(speaker, str) for speaker in state.get("speakers", []))
    )
    if not sound:
        raise UserError(f"{path}: damaged: parts of the checkpoint are missing or of a wrong type")


def _are_logs(logs):
    """Whether these can be `checkpoint_logs.json`: lists over the same epochs."""
    return (
        isinstance(logs, dict)
        and isinstance(logs.get("epoch", []), list)
        and all(
            len(series) == len(logs.get("epoch", []))
            for series in logs.values()
            if isinstance(series, list)
        )
    )


def check_resumable(checkpoint, weights):
    """Raise UserError, naming what is damaged, unless training can go on from this checkpoint.

    `weights`: the state dict of the model that goes on. The optimiser's state and the hidden state
    are checked where they are loaded.
    """
    state, best = checkpoint.state, checkpoint.state.get("best")
    sound = {
        "optimizer": isinstance(state.get("optimizer"), dict),
        "best": best is None or _same_shapes(best, weights),
    }
    if not checkpoint.of_original:
        machine = state.get("machine")
        sound |= {
            "logs": _are_training_logs(state["logs"]),
            "best_accuracy": _is_number(state.get("best_accuracy")),
            "hidden": "hidden" in state,
            "fingerprint": isinstance(state.get("fingerprint"), str),
            "machine": isinstance(machine, dict) and all(map(_is_plain, machine.values())),
            "clock": "clock" not in state or _is_clock(state["clock"]),
        }
        sound["running"] = sound["logs"] and _are_running_sums(
            state.get("running"), state["position"], state["logs"]
        )
    damaged = [name for name, is_sound in sound.items() if not is_sound]
    if damaged:
        raise UserError(
            f"{checkpoint.path}: training can't go on from it: {', '.join(damaged)}: missing or "
            "damaged (to start from its weights, use --load)"
        )


def _same_shapes(state, weights):
    return (
        isinstance(state, dict)
        and state.keys() == weights.keys()
        and all(torch.is_tensor(v) and v.shape == weights[key].shape for key, v in state.items())
    )


def _is_plain(value):
    return value is None or isinstance(value, str | float | int)


def _is_number(value):
    return isinstance(value, float | int) and not math.isnan(value)


def _is_clock(value):
    """Whether this can be the `state` of a Clock (utils/run/logs.py)."""
    return (
        isinstance(value, dict)
        and value.keys() == {"seconds", "waited", "windows"}
        and all(_is_number(n) and 0 <= n < math.inf for n in value.values())
    )


def _is_row(value):
    """Whether this can be what an epoch's logs have for each prediction step, or each probe."""
    return isinstance(value, list) and value and all(isinstance(n, float | int) for n in value)


def _rows(logs):
    """The losses and accuracies by prediction step in the logs of a training run."""
    before = logs.get("before_training", {})
    return [row for key in ROW_SERIES for row in logs.get(key, [])] + list(before.values())


def _are_training_logs(logs):
    """Whether these logs, whose lists are over the same epochs, can be those of a training run."""
    series = {key: value for key, value in logs.items() if isinstance(value, list)}
    rest = {key: value for key, value in logs.items() if key not in series}
    before = rest.pop("before_training", {})
    sound = (
        isinstance(before, dict)
        and ("before_training" not in logs or before.keys() == {"locLoss_val", "locAcc_val"})
        and all(map(_is_plain, rest.values()))
        and not rest.keys() & {*ROW_SERIES, *NUMBER_SERIES}
        and (not series.get("epoch") or series.keys() >= set(ROW_SERIES))
        and all(isinstance(epoch, int) for epoch in series.get("epoch", []))
        and all(_can_be_logged(key, value) for key, values in series.items() for value in values)
    )
    return sound and all(map(_is_row, _rows(logs))) and len(set(map(len, _rows(logs)))) <= 1


def _can_be_logged(key, value):
    """Whether an epoch's logs can have this; what an epoch had no value for is None."""
    is_number = value is None or isinstance(value, float | int)
    return is_number or (_is_row(value) and key not in NUMBER_SERIES)


def _are_running_sums(running, position, logs):
    """Whether these can be the sums (utils/run/logs.py) of an epoch that has come to `position`."""
    if not isinstance(running, dict) or not running.keys() >= {"sums", "norms"}:
        return False
    windows, batches = running.get("windows"), running.get("batches")
    if not all(isinstance(n, int) and n >= 0 for n in (windows, batches)):
        return False
    sums, norms = running["sums"], running["norms"]
    if position[1:] == [0, 0]:  # between epochs there are none
        return not batches and _is_number(sums) and _is_number(norms)
    return (
        windows >= batches > 0
        and torch.is_tensor(sums)
        and torch.is_tensor(norms)
        and {tuple(sums.shape)} == {(2, len(row)) for row in _rows(logs)}
        and norms.ndim == 0
        and sums.is_floating_point()
        and norms.is_floating_point()
    )


def save_checkpoint(directory, state, epoch=None):
    """Write the checkpoint of `epoch`, or, without one, `checkpoint_resume.pt`.

    `state` is what `Checkpoint.state` describes, without `format`. The `.pt` comes first: if
    anything fails after it, the JSON files are stale, never ahead. Raises OSError if the disk is
    full; the files written before are then as they were.
    """
    directory = Path(directory)
    name = RESUME_NAME if epoch is None else f"checkpoint_{epoch}.pt"
    save_tensors(directory / name, {**state, "format": FORMAT})
    save_json(directory / "checkpoint_args.json", state["args"])
    save_json(directory / "checkpoint_logs.json", state["logs"])
    if epoch is not None:
        with contextlib.suppress(FileNotFoundError):
            (directory / RESUME_NAME).unlink()
    return directory / name


def remove_old_checkpoints(directory, newest, n_kept, best):
    """Remove all but the last `n_kept` numbered checkpoints and that of the epoch `best`.

    `newest` is the epoch whose checkpoint was just written, so that there is a sound one after
    every other that goes. Later ones can only be leftovers that couldn't be read: they don't count.
    """
    older = [(epoch, path) for epoch, path in numbered_checkpoints(directory) if epoch <= newest]
    for epoch, path in older[:-n_kept]:
        if epoch != best:
            path.unlink(missing_ok=True)


def copy_to_cpu(state):
    """A state dict's own copy in host memory."""
    return {key: value.detach().to("cpu", copy=True) for key, value in state.items()}


def load_weights(module, state, source):
    """`module.load_state_dict(state)`. Raises UserError, naming the file, where they don't fit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise UserError(
            f"{source}: its weights don't fit this architecture: {' '.join(reasons)[:300]}"
        ) from error


def load_optimizer(optimizer, state, source):
    """Load Adam's state; settings such as `fused` stay as this program made them."""
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    try:
        if not isinstance(state["param_groups"], list):
            raise TypeError("its groups are no list")
        optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in optimizer.state:
                    _check_moments(optimizer.state[parameter], parameter)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise UserError(f"{source}: its optimizer state doesn't fit ({error})") from error
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
        for parameter in group["params"]:
            if parameter in optimizer.state:  # the fused optimiser counts steps on the device
                moments = optimizer.state[parameter]
                moments["step"] = torch.as_tensor(moments["step"]).float().to(parameter.device)


def _check_moments(moments, parameter):
    """Raise one of several errors unless Adam can go on with these."""
    shapes = {moments[key].shape for key in ("exp_avg", "exp_avg_sq")}
    strided = all(moments[key].layout == torch.strided for key in ("exp_avg", "exp_avg_sq"))
    if shapes != {parameter.shape} or not strided or torch.as_tensor(moments["step"]).numel() != 1:
        raise ValueError("moments of another shape than the weights")
    float(moments["step"])


def check_speakers(checkpoint, speakers):
    """Raise UserError if weights that belong to speakers would be given to others.

    speakers: those of the database in the order of their numbers.
    """
    kept = checkpoint.state.get("speakers", list(speakers))  # older checkpoints have none
    changed = sorted({*kept} ^ {*speakers})
    if changed:
        raise UserError(
            f"{checkpoint.path}: its criterion has weights for each speaker of its database, and "
            f"this one has other speakers: {first_few(changed)} are in one of the two only"
        )


def follow_speaker_order(checkpoint, criterion, speakers, listing):
    """Renumber the speakers in a checkpoint of the original as this program numbers them.

    The original numbers speakers as it meets them on the disk, and keeps that order in `listing`,
    the file `_seqs_cache.txt` beside the audio. Changes the checkpoint's state: its speaker
    embedding, and the moments of that in the optimiser; `speakers` is our order, `criterion` the
    network that the embedding is for. Raises UserError if the order can't be known.
    """
    key = "speakerEmb.weight"
    weights = checkpoint.state["cpcCriterion"]
    if not checkpoint.of_original or key not in weights:
        return
    if not listing.is_file():
        raise UserError(
            f"{checkpoint.path}: has a speaker embedding of the original program, which numbered "
            f"speakers in an order of its own: {listing} is needed, which it kept beside the audio"
        )
    content = load_tensors(listing)
    found = content[1] if isinstance(content, tuple) and len(content) == 2 else None
    if not isinstance(found, list) or sorted(map(str, found)) != sorted(speakers):
        raise UserError(f"{listing}: doesn't list the speakers that are in the database")
    order = torch.tensor([found.index(speaker) for speaker in speakers])
    number = [name for name, _ in criterion.named_parameters()].index(key)
    moments = checkpoint.state["optimizer"]["state"].get(number, {})
    for holder, name in ((weights, key), (moments, "exp_avg"), (moments, "exp_avg_sq")):
        if name in holder:
            holder[name] = holder[name][order]
