"""Checkpoint files: finding, reading and writing them.

A run's directory holds

- `checkpoint_<epoch>.pt`, written after an epoch. The original program's keys: `gEncoder` (state of
  the whole CPC model), `cpcCriterion`, `optimizer`, `best` (state of the best model so far). Our
  additions: `args`, `logs`, `position` (where training resumes), `running` (sums of the epoch in
  progress), `best_accuracy`, `hidden` (kept hidden state), `fingerprint` (of the corpus),
  `machine`, `models` (flags of each part of a model that came from `--load`), `speakers` (names by
  id, if the criterion has weights for each speaker) and `format`;
- `checkpoint_resume.pt`, the same inside an epoch, newer than every other or absent. It also has a
  `clock`: the time and the windows of the epoch so far;
- `checkpoint_args.json` and `checkpoint_logs.json`, copies of `args` and `logs` for people and for
  the original program. They are read only beside a checkpoint of the original.

All of it loads with `torch.load(..., weights_only=True)`.
"""

import argparse
import contextlib
import copy
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from utils.files import load_json, load_tensors, remove_leftovers, save_json, save_tensors
from utils.misc import UserError, first_few
from utils.run import hcpc
from utils.run.checkpoint_checks import are_logs, are_training_logs, check_types
from utils.run.flags import ARCHITECTURE, stored_arguments

FORMAT = 1  # of our additions to the original's keys
RESUME_NAME = "checkpoint_resume.pt"
MODEL_FLAGS = ARCHITECTURE | {"samplingType"}  # which decides whether hidden states are kept
NULLSPACE = "nullspace.weight"
FRAME_LEVEL = "frameLevelModel."  # prefix of the keys of the lower of two levels
PART = re.compile(r"((?:models\.\d+\.)+)(.*)")  # a key of one of several concatenated models
NUMBERED_NAME = re.compile(r"checkpoint_(\d+)\.pt")


@dataclass
class Checkpoint:
    """The content of a checkpoint file, completed if another program wrote it.

    of_original: whether one did: the original program, its parent CPC_audio, or a published model's
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
    """Paths of all checkpoints in a directory, including the one inside an epoch."""
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

    Warns of unreadable ones. Raises UserError if all are unreadable, so that a run never silently
    starts from scratch over checkpoints that might still be recovered.
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
            f"{directory}: no checkpoint there can be read ({failures[0]}); put back an intact "
            "one, or start from scratch with --restart"
        )
    return within_epoch


def remove_stale(directory, source):
    """Delete what a killed run left behind: parts of files, and an older `checkpoint_resume.pt`.

    source: the Checkpoint that the run resumes from, or None; if it was preferred, that is older.
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
    check_types(path, state)
    if of_original:
        hcpc.take_over(state)
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
    with contextlib.suppress(UserError):  # the logs are optional
        state["logs"] = hcpc.renamed(load_json(path.parent / "checkpoint_logs.json"))
    done = int(match[1]) + 1 if match else 1
    logs = state["logs"]
    if not (are_logs(logs) and are_training_logs(logs)) or len(logs.get("epoch", [])) < done:
        state["logs"] = {}
    state["logs"] = {
        key: value[:done] if isinstance(value, list) else value
        for key, value in state["logs"].items()
    }
    state["position"] = [done, 0, 0]


# ---------------------------------------------------------------------- the models in a checkpoint


class StoredModel(NamedTuple):
    """A model in a checkpoint, or several concatenated ones that share a null-space projection."""

    arguments: list  # namespaces of architecture flags, one for each single model
    state: dict
    source: str  # the file
    of_original: bool

    @property
    def widths(self):
        """The widths of its contexts and of its encoded frames."""
        if NULLSPACE in self.state:
            return (self.state[NULLSPACE].size(0),) * 2
        return self.arguments[0].hiddenGar, self.arguments[0].hiddenEncoder


def stored_models(
    checkpoints, *, load_best=False, gru_level=-1, nullspace=False, only_frames=False
):
    """The StoredModels of one or several checkpoints, whose features are concatenated.

    Parameters and errors: see `feature_loader.load_model`.
    """
    if isinstance(checkpoints, str | os.PathLike | Checkpoint):
        checkpoints = [checkpoints]
    found = []
    for named in checkpoints:
        checkpoint = named if isinstance(named, Checkpoint) else open_checkpoint(named)
        for model in _models_of(checkpoint, load_best):
            if nullspace and NULLSPACE not in model.state:
                raise UserError(f"{model.source}: isn't a checkpoint of a null-space model")
            if only_frames and any(flags.multiLevel for flags in model.arguments):
                model = _frame_level(model)
            found.append(_keep_layers(model, gru_level))
    return found


def _models_of(checkpoint, load_best):
    state, path = checkpoint.state["gEncoder"], checkpoint.path
    if load_best:
        state = checkpoint.state.get("best")
        if not isinstance(state, dict):
            raise UserError(f"{path}: holds no best model yet, only the latest")
    arguments, states = stored_architecture(checkpoint), split_state(state)
    sizes = [_n_models(state) for state in states]
    if len(arguments) != sum(sizes):
        raise UserError(
            f"{path}: holds the weights of {sum(sizes)} models, but the arguments of "
            f"{len(arguments)}"
        )
    flags = iter(arguments)
    return [
        StoredModel(list(itertools.islice(flags, size)), state, path, checkpoint.of_original)
        for size, state in zip(sizes, states, strict=True)
    ]


def _n_models(state):
    """How many single models there are in a part's state."""
    inside = split_state(state_under_null_space(state)) if NULLSPACE in state else []
    return sum(map(_n_models, inside)) or 1


def state_under_null_space(state):
    """The state of the model below a null space."""
    return {key.removeprefix("cpc."): v for key, v in state.items() if key.startswith("cpc.")}


def split_state(state):
    """The states of concatenated models, in their order; that of a single model as it is."""
    parts = {}
    for key, value in state.items():
        match = PART.fullmatch(key)
        prefix, name = match.groups() if match else ("", key)
        parts.setdefault(tuple(map(int, re.findall(r"\d+", prefix))), {})[name] = value
    return [parts[position] for position in sorted(parts)]


def stored_architecture(checkpoint, led_here=()):
    """The architecture flags of every single model in a `Checkpoint`: a list of namespaces.

    The original program doesn't store those of models that a run started from (`--load`): they are
    looked up in the checkpoints that it names (`led_here`: those that named this one). Raises
    UserError if these are gone.
    """
    stored, path = checkpoint.state["args"], checkpoint.path
    if path in led_here:
        raise UserError(f"{path}: names itself among the checkpoints that it started from")
    if "models" in checkpoint.state:
        return [_model_flags(flags, path) for flags in checkpoint.state["models"]]
    hcpc.refuse_unsupported(stored, path)
    started_from = _started_from(checkpoint) if checkpoint.of_original else []
    missing = [name for name in started_from if not os.path.exists(name)]
    concatenated = any(PART.fullmatch(key) for key in checkpoint.state["gEncoder"])
    if started_from and not missing:
        above = (*led_here, path)
        inner = (stored_architecture(open_checkpoint(name), above) for name in started_from)
        return list(itertools.chain.from_iterable(inner))
    if concatenated or (started_from and "hiddenEncoder" not in stored):
        raise UserError(
            f"{path}: doesn't describe its model, but names the checkpoints that it started from, "
            f"which aren't there: {first_few(missing) or 'none'}. Put them back, or correct `load` "
            "in checkpoint_args.json"
        )
    return [_model_flags(stored, path)]


def _started_from(checkpoint):
    """Checkpoints of other runs that one of the original program started from (`--load`)."""
    stored = checkpoint.state["args"]
    names = [str(name) for name in stored.get("load") or []]
    own = str(stored.get("pathCheckpoint"))
    its_own = {own, os.path.dirname(own), os.path.dirname(os.path.abspath(checkpoint.path))}
    resumed = len(names) == 1 and os.path.dirname(names[0]) in its_own
    return [] if resumed else names


def _model_flags(stored, source):
    """The stored arguments that `build_model` needs, as a namespace."""
    args = stored_arguments({k: v for k, v in stored.items() if k in MODEL_FLAGS}, source)
    if args.arMode in ("no_ar", "transformer"):  # these keep the encoder's width, whatever is asked
        args.hiddenGar = args.hiddenEncoder
    return args


def _frame_level(model):
    """The frame level of a model of two levels."""
    if NULLSPACE in model.state:
        raise UserError(f"{model.source}: the frame level of a null-space model can't be loaded")
    arguments = [copy.copy(args) for args in model.arguments]
    for args in arguments:
        args.multiLevel = False
    state = {
        key.removeprefix(FRAME_LEVEL): value
        for key, value in model.state.items()
        if key.startswith(FRAME_LEVEL)
    }
    return model._replace(arguments=arguments, state=state)


def _keep_layers(model, n_layers):
    """Only the first layers of the recurrent network, if `n_layers` is above 0."""
    if n_layers <= 0:
        return model
    arguments = [copy.copy(args) for args in model.arguments]
    for args in arguments:
        available = args.nLevelsGRU if args.arMode in ("LSTM", "GRU", "RNN") else 0
        if n_layers > available:
            raise UserError(
                f"--gru_level {n_layers}: {model.source} has {available} recurrent layers"
            )
        args.nLevelsGRU = n_layers
    layer = re.compile(r".*\.baseNet\.\w+_l(\d+)")

    def is_kept(key):
        match = layer.fullmatch(key)
        return not match or int(match[1]) < n_layers

    state = {key: value for key, value in model.state.items() if is_kept(key)}
    return model._replace(arguments=arguments, state=state)


# ------------------------------------------------------------------------------ writing and loading


def save_checkpoint(directory, state, epoch=None):
    """Write the checkpoint of `epoch`, or, without one, `checkpoint_resume.pt`.

    `state` is what `Checkpoint.state` describes, without `format`. The `.pt` comes first: if
    anything fails after it, the JSON files are stale, never ahead. Raises OSError if the disk is
    full; the files that existed before then stay as they were.
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

    `newest` is the epoch whose checkpoint was just written, so an intact one is always left. Later
    ones can only be leftovers that couldn't be read: they don't count.
    """
    older = [(epoch, path) for epoch, path in numbered_checkpoints(directory) if epoch <= newest]
    for epoch, path in older[:-n_kept]:
        if epoch != best:
            path.unlink(missing_ok=True)


def copy_to_cpu(state):
    """A copy of a state dict in host memory."""
    return {key: value.detach().to("cpu", copy=True) for key, value in state.items()}


def load_weights(module, state, source):
    """`module.load_state_dict(state)`. Raises UserError, naming the file, if they don't fit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise UserError(
            f"{source}: its weights don't fit this architecture: {' '.join(reasons)[:300]}"
        ) from error
    if not all(weights.isfinite().all() for weights in module.parameters()):
        print(f"warning: {source}: some of its weights are NaN or infinite")


def load_criterion(criterion, checkpoint, corpus):
    """Load the criterion's weights; `corpus` has the speakers, and the root of the audio.

    Raises UserError if they don't fit.
    """
    listing = Path(corpus.root, "_seqs_cache.txt")
    permute_speakers(checkpoint, criterion, corpus.speakers, listing)
    check_speakers(checkpoint, corpus.speakers)
    load_weights(criterion, checkpoint.state["cpcCriterion"], checkpoint.path)


def check_speakers(checkpoint, speakers):
    """Raise UserError if speakers would get the weights of others.

    speakers: names of the database's speakers, in the order of their ids.
    """
    kept = checkpoint.state.get("speakers", list(speakers))  # older checkpoints have none
    changed = sorted({*kept} ^ {*speakers})
    if changed:
        raise UserError(
            f"{checkpoint.path}: its criterion has weights for each speaker of its database, and "
            f"this one has other speakers: {first_few(changed)} are in only one of the two"
        )


def permute_speakers(checkpoint, criterion, speakers, listing):
    """Renumber the speakers in a checkpoint of the original as this program numbers them.

    The original numbers speakers as it finds them on the disk, and stores that order in `listing`,
    the file `_seqs_cache.txt` beside the audio. Changes the checkpoint's state: its speaker
    embedding, and the moments of that in the optimiser; `speakers` is our order, `criterion` the
    network that the embedding is for. Raises UserError if the order is unknown.
    """
    key = "speakerEmb.weight"
    weights = checkpoint.state["cpcCriterion"]
    if not checkpoint.of_original or key not in weights:
        return
    if not listing.is_file():
        raise UserError(
            f"{checkpoint.path}: has a speaker embedding of the original program, which numbered "
            f"speakers in another order: {listing} is needed, which it wrote beside the audio"
        )
    content = load_tensors(listing)
    found = content[1] if isinstance(content, tuple) and len(content) == 2 else None
    if not isinstance(found, list) or sorted(map(str, found)) != sorted(speakers):
        raise UserError(f"{listing}: doesn't list the speakers of the database")
    order = torch.tensor([found.index(speaker) for speaker in speakers])
    number = [name for name, _ in criterion.named_parameters()].index(key)
    moments = checkpoint.state["optimizer"]["state"].get(number, {})
    for holder, name in ((weights, key), (moments, "exp_avg"), (moments, "exp_avg_sq")):
        if name in holder:
            holder[name] = holder[name][order]
