"""Settles the flags of a call: the command line against the checkpoint that it resumes or uses.

No network is built here: a checkpoint's stored flags and the shapes of its weights describe it.
"""

import os

from utils.misc import UserError, first_few
from utils.run.checkpoint import NULLSPACE, newest_checkpoint, open_checkpoint, stored_models
from utils.run.flags import (
    ARCHITECTURE,
    CAPTURE_GROUP,
    DATA_ORDER,
    INHERITED,
    MODEL,
    PATHS,
    PROBE_GROUP,
    TWO_LEVELS,
    stored_arguments,
)
from utils.run.hcpc import refuse_unsupported
from utils.run.rules import check_arguments, complete


def resolve(args, explicit):
    """Complete `args` by the flags of the checkpoint that the run resumes from or works on.

    explicit: names of the flags on the command line. Returns the arguments and the Checkpoint
    (None at the beginning of a run). Raises UserError for flags that can't work.
    """
    checkpoint = find_checkpoint(args)
    if checkpoint:
        warnings = inherit_args(args, explicit, checkpoint.state["args"], checkpoint.path)
        for line in warnings:
            print(f"warning: {line}")
        if warnings and not works_on_checkpoint(args):
            print(f"resuming the run in {args.pathCheckpoint}; a new run needs another directory")
        # These have the checkpoint's values, so values on the command line contradict nothing.
        explicit = explicit - ARCHITECTURE - DATA_ORDER
    elif args.load:
        explicit = explicit - adopt_architecture(args, explicit)
    began_with_load = "models" in checkpoint.state if checkpoint else bool(args.load)
    complete(args, explicit, began_with_load)
    check_arguments(args, explicit, checkpoint is not None, began_with_load)
    return args, checkpoint


def works_on_checkpoint(args):
    """Whether the call captures or probes a finished model instead of training one."""
    return args.onlyCapture or args.only_classif_metric


def find_checkpoint(args):
    """The Checkpoint to resume from or to work on; None at the beginning of a run."""
    if works_on_checkpoint(args):
        return open_checkpoint(args.pathCheckpoint)
    return None if args.restart else newest_checkpoint(args.pathCheckpoint)


def inherit_args(args, explicit, stored, source):
    """Set the flags of `args` that are inherited from `stored`, those in the checkpoint `source`.

    Only these are read: other stored values may mean nothing to this program. Returns a warning for
    every flag whose value, on the command line or stored, isn't used although the user might expect
    it.
    """
    refuse_unsupported(stored, source)
    taken = ARCHITECTURE | inherited_flags(args, explicit, stored)
    checkpoint_args = stored_arguments({n: stored[n] for n in taken & stored.keys()}, source)
    warnings = []
    for name in sorted(taken):
        value = getattr(checkpoint_args, name)
        if name in explicit and getattr(args, name) != value:
            shown = "off" if value in (None, False) else value
            warnings.append(f"--{name}: using the checkpoint's value, {shown}")
        setattr(args, name, value)
    labels = args.path_phone_data
    if args.onlyCapture and "path_phone_data" not in explicit and is_gone(labels):
        warnings.append(f"--path_phone_data: {labels} is gone: no phones are captured")
        args.path_phone_data = None
    return warnings


def inherited_flags(args, explicit, stored):
    """Names of the flags, beside the architecture's, whose stored values are taken."""
    inherited = INHERITED - explicit
    if not works_on_checkpoint(args):
        # Another order of the data would be another run, unless a list is gone and named again.
        gone = {name for name in DATA_ORDER & PATHS if is_gone(stored.get(name))}
        inherited |= DATA_ORDER - (gone & explicit)
    else:
        # Captures and probes must be asked for again; training lists only matter to probes.
        inherited |= DATA_ORDER - explicit - {"pathTrain", "pathVal"}
        inherited -= CAPTURE_GROUP | PROBE_GROUP
    if args.only_classif_metric:
        inherited |= {"pathTrain", "pathVal"} - explicit
        inherited -= {"path_phone_data"}  # whether it is given decides if phones are probed
    for chosen, other in (("captureDSfreq", "captureDStotNr"), ("captureDStotNr", "captureDSfreq")):
        if chosen in explicit:
            inherited -= {other}
    return inherited


def is_gone(path):
    """Whether a stored path no longer exists, or is a list of several (of hCPC)."""
    if isinstance(path, list):
        return True
    return isinstance(path, str) and bool(path) and not os.path.exists(path)


def adopt_architecture(args, explicit):
    """Set the architecture flags to those of the model (and criterion) that `--load` names.

    Prints what changes, with a warning for flags in `explicit`. Returns the names of these flags.
    """
    for path in args.load:
        if not os.path.exists(path):
            raise UserError(f"--load {path}: no such directory or file")
    choice = {"gru_level": args.gru_level, "nullspace": args.nullspace}
    models = stored_models(args.load, only_frames=args.loadOnlyFrameModel, **choice)
    check_levels_of(models, args)
    adopted = {}
    if args.loadCriterion:
        source = open_checkpoint(args.load[0])
        flags = stored_arguments(source.state["args"], source.path)
        adopted = {name: getattr(flags, name) for name in ARCHITECTURE - MODEL}
    parts = [flags for model in models for flags in model.arguments]
    # A new level of segments may come on top of a frame level.
    of_model = MODEL - TWO_LEVELS if args.loadOnlyFrameModel else MODEL
    for name in of_model:
        values = [getattr(flags, name) for flags in parts]
        if all(value == values[0] for value in values):
            adopted[name] = values[0]
    widths = map(sum, zip(*(model.widths for model in models), strict=True))
    adopted |= zip(("hiddenGar", "hiddenEncoder"), widths, strict=True)
    for name, value in sorted(adopted.items()):
        if getattr(args, name) != value:
            prefix = "warning: " if name in explicit else ""
            instead = f"(instead of {getattr(args, name)})"
            print(f"{prefix}--{name}: {value}, as in the loaded model {instead}")
            setattr(args, name, value)
    own = sorted(ARCHITECTURE - MODEL - {"speaker_level"} - adopted.keys())
    other = [f"--{name}" for name in own if getattr(args, name) != getattr(parts[0], name)]
    if other:
        print(
            "note: the criterion is new, with other flags than the loaded run's: "
            f"{first_few(other)}; --loadCriterion takes over the old one"
        )
    return adopted.keys() | of_model


def check_levels_of(models, args):
    """Refuse to train on loaded models whose levels aren't those of one MultiLevelModel."""
    parts = [flags for model in models for flags in model.arguments]
    if any(flags.multiLevel for flags in parts) and (
        len(parts) > 1 or NULLSPACE in models[0].state
    ):
        raise UserError(
            "--load: a model of two levels can't be trained further beside another one or below a "
            "null space; --loadOnlyFrameModel loads only its frame level"
        )
    if args.multiLevel and not args.loadOnlyFrameModel and not any(f.multiLevel for f in parts):
        raise UserError(
            "--load: the loaded model has no level of segments: --loadOnlyFrameModel puts a new "
            "one on top, or leave out --multiLevel"
        )
