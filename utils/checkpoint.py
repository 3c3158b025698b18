"""Checkpoint files: finding, reading and writing them.

A run's directory holds

- `checkpoint_<epoch>.pt`, written after an epoch. The original program's keys: `gEncoder` (state of
  the whole CPC model), `cpcCriterion`, `optimizer`, `best` (state of the best model so far). Ours
  besides: `args`, `logs`, `position` (where training goes on), `running` (sums of the epoch in
  progress), `best_accuracy`, `hidden` (kept hidden state), `fingerprint` (of the corpus),
  `machine`, `models` (flags of each part of a model that began with `--load`) and `format`;
- `checkpoint_resume.pt`, the same inside an epoch, newer than every other or absent;
- `checkpoint_args.json` and `checkpoint_logs.json`, copies of `args` and `logs` for people and for
  the original program. They are read only beside a checkpoint of the original.

All of it loads with `torch.load(..., weights_only=True)`.
"""

import argparse
import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.files import load_json, load_tensors, save_json, save_tensors
from utils.misc import UserError

FORMAT = 1  # of our additions to the original's keys
RESUME_NAME = "checkpoint_resume.pt"
LOGS_OF_STEPS = frozenset(("locLoss_train", "locAcc_train", "locLoss_val", "locAcc_val"))
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


def read_checkpoint(path):
    """Read a checkpoint of this program, of the original, or a published model.

    The parent of the original, CPC_audio, writes the same files; flags that aren't known here are
    left out and missing ones have their defaults (utils/arguments.py). A published model is one
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
    if state["format"] != FORMAT:
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
    if not _are_logs(logs) or not logs.keys() >= LOGS_OF_STEPS or len(logs.get("epoch", [])) < done:
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
        all(isinstance(key, str) for key in state["gEncoder"])
        and isinstance(state.get("cpcCriterion"), dict)
        and isinstance(state.get("args"), dict)
        and _are_logs(state.get("logs"))
        and isinstance(position, list)
        and len(position) == 3
        and all(isinstance(number, int) and number >= 0 for number in position)
        and isinstance(state.get("models", []), list)
        and all(isinstance(flags, dict) for flags in state.get("models", []))
    )
    if not sound:
        raise UserError(f"{path}: damaged: parts of the checkpoint are missing or of a wrong type")


def _are_logs(logs):
    """Whether these can be `checkpoint_logs.json`: lists over the same epochs, of numbers."""
    if not isinstance(logs, dict) or not isinstance(logs.get("epoch", []), list):
        return False
    epochs, before = logs.get("epoch", []), logs.get("before_training", {})
    series = [series for series in logs.values() if isinstance(series, list)]
    steps = [logs[key] for key in LOGS_OF_STEPS & logs.keys()]
    return (
        all(isinstance(epoch, int) for epoch in epochs)
        and all(len(values) == len(epochs) for values in series)
        and all(_is_logged(value) for values in series for value in values)
        and all(isinstance(rows, list) and all(map(_are_numbers, rows)) for rows in steps)
        and isinstance(before, dict)
        and all(map(_are_numbers, before.values()))
    )


def _is_logged(value):
    return value is None or isinstance(value, int | float) or _are_numbers(value)


def _are_numbers(row):
    return isinstance(row, list) and row and all(isinstance(n, int | float) for n in row)


def check_resumable(checkpoint):
    """Raise UserError unless training can go on from this checkpoint."""
    state = checkpoint.state
    sound = (
        isinstance(state.get("optimizer"), dict)
        and isinstance(state.get("best"), dict | None)
        and (not state["logs"].get("epoch") or state["logs"].keys() >= LOGS_OF_STEPS)
    )
    if not checkpoint.of_original:
        running = state.get("running")
        sound = (
            sound
            and isinstance(state.get("best_accuracy"), float | int)
            and isinstance(running, dict)
            and running.keys() >= {"sums", "norms", "windows", "batches"}
            and all(isinstance(running[key], int) for key in ("windows", "batches"))
            and (not running["batches"] or getattr(running["sums"], "ndim", 0) == 2)
            and {"hidden", "machine", "fingerprint"} <= state.keys()
        )
    if not sound:
        raise UserError(
            f"{checkpoint.path}: training can't go on from it: what a training run keeps is "
            "missing or damaged (to start from its weights, use --load)"
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
        optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in optimizer.state:
                    _check_moments(optimizer.state[parameter], parameter)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source}: its optimizer state doesn't fit ({error})") from error
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
        for parameter in group["params"]:
            if parameter in optimizer.state:  # the fused optimiser counts steps on the device
                moments = optimizer.state[parameter]
                moments["step"] = torch.as_tensor(moments["step"]).float().to(parameter.device)


def _check_moments(moments, parameter):
    """Raise one of several errors unless this is Adam's state of a parameter."""
    float(moments["step"])
    for key in ("exp_avg", "exp_avg_sq"):
        if moments[key].shape != parameter.shape or moments[key].layout != torch.strided:
            raise ValueError("moments of another shape than the weights")


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
