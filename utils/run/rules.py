"""The rules between the flags of train.py, checked before any audio is looked for.

`check_...` change nothing and raise UserError with the flag and what to do. Their `explicit` holds
the flags that the user chose: only contradictions between these are errors.
"""

import importlib.util
import os
import shutil

import torch

from utils.files import check_writable
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError, counted
from utils.run.captured import predicts_frames
from utils.run.command import refuse_any
from utils.run.flags import (
    AUGMENT_TYPES,
    AUGMENTATION,
    CAPTURE_GROUP,
    CAPTURED_BY,
    CONTRASTIVE_ONLY,
    CPCCTC_ONLY,
    EFFECT_OF,
    PROBE_GROUP,
    SUPERVISED_ONLY,
    TWO_LEVELS,
)
from utils.run.level_flags import check_levels, complete_levels
from utils.run.machine import device_from
from utils.run.shared_flags import check_probe_flags

RECURRENT = ("LSTM", "GRU", "RNN")
RECORDINGS = ("pathDBNoise", "pathImpulseResponses")
SNR_RANGE = ("min_snr_in_db", "max_snr_in_db")
CAPTURE_SWITCHES = {*CAPTURED_BY, "captureEverything"}


def complete(args, explicit, began_with_load=False):
    """Set what follows from other flags; the parameters are those of `check_arguments`."""
    if args.only_classif_metric:
        args.supervised_classif_metric = True
    if args.arMode not in RECURRENT and "hiddenGar" not in explicit and not began_with_load:
        args.hiddenGar = args.hiddenEncoder
    has_side = args.augment_past or args.augment_future
    if {*(args.augment_type or ())} == {"none"} or not ({"augment_type"} & explicit or has_side):
        # As in the original, which ignored a stored type without a side.
        args.augment_type, args.augment_past, args.augment_future = None, False, False
    if args.additive_noise_snr is not None and not {*SNR_RANGE} & explicit:
        args.min_snr_in_db = args.max_snr_in_db = args.additive_noise_snr
    complete_levels(args, explicit)
    turned_off = CAPTURE_SWITCHES & switched_off(args, explicit)
    wanted = captured(args) or args.captureSetStats
    if turned_off and not wanted and "pathCaptureDS" not in explicit:
        args.pathCaptureDS = None  # inherited, but nothing is captured any more


def switched_off(args, explicit):
    """Switches given as --no-FLAG: rules don't count them as given."""
    return {name for name in explicit if getattr(args, name) is False}


def captured(args):
    """The capture switches that are on, without stats."""
    return sorted(name for name in CAPTURE_SWITCHES if getattr(args, name))


def check_call(args, explicit):
    """Refuse what can't work whatever the checkpoint says, before one is looked for."""
    check_mode(args, explicit - switched_off(args, explicit))
    check_machine(args)


def check_arguments(args, explicit, resumed=False, began_with_load=False):
    """Refuse what can't work, after `complete` and before audio is looked for.

    explicit: flags given, without those that the checkpoint decides; resumed: whether there is one;
    began_with_load: the model wasn't built from these flags, which only give the widths of its
    features.
    """
    explicit = explicit - switched_off(args, explicit)
    check_window(args)
    if not args.onlyCapture and not args.only_classif_metric:
        check_augmentation(args, explicit)
    if not began_with_load:
        check_model(args, explicit)
    check_criterion(args, explicit)
    check_levels(args, explicit, TWO_LEVELS, resumed)
    check_supervised(args, explicit)
    check_probes(args, explicit)
    check_tensorboard(args)
    check_capture(args, explicit)
    check_paths(args, resumed)


def check_tensorboard(args):
    if not args.tensorboard or args.onlyCapture or args.only_classif_metric:
        return
    found = importlib.util.find_spec("tensorboard")
    if found is None or found.origin is None:  # not a folder of that name
        raise UserError(
            "--tensorboard needs a library: python -m pip install tensorboard; or leave out the "
            "flag (--no-tensorboard in a resumed run)"
        )
    if args.tensorboard is not True:
        check_writable(args.tensorboard, f"--tensorboard {args.tensorboard}: event files")


# ------------------------------------------------------------------------------ mode and machine


def check_mode(args, explicit):
    if args.onlyCapture and args.only_classif_metric:
        raise UserError("--onlyCapture and --only_classif_metric: choose one of them")
    for mode in ("onlyCapture", "only_classif_metric"):
        if getattr(args, mode) and (args.restart or args.load):
            raise UserError(
                f"--{mode} takes its model from --pathCheckpoint DIR (a run) or FILE (a "
                "checkpoint): leave out --restart, --load and --loadCriterion"
            )
    if args.onlyCapture or args.only_classif_metric:
        refuse_any(explicit & {"tensorboard"}, "has no effect without training")
    if args.onlyCapture:
        reason = "has no effect: --onlyCapture runs no probe; --only_classif_metric does"
        refuse_any(explicit & PROBE_GROUP, reason)
    if args.only_classif_metric:
        reason = "has no effect: --only_classif_metric captures nothing; --onlyCapture does"
        refuse_any(explicit & CAPTURE_GROUP, reason)
    if not args.pathCheckpoint:
        raise UserError("--pathCheckpoint DIR is needed: where a new run goes, or one to resume")
    if not args.load:
        of_loading = ("loadCriterion", "loadOnlyFrameModel", "nullspace")
        refuse_any({name for name in of_loading if getattr(args, name)}, "needs --load")
        if args.gru_level > 0:
            raise UserError("--gru_level needs --load")
    if args.loadCriterion and args.loadOnlyFrameModel:
        raise UserError("--loadCriterion can't be used with --loadOnlyFrameModel: leave one out")
    if args.loadCriterion and len(args.load) > 1:
        raise UserError(
            "--loadCriterion: a criterion fits the one model that it was trained with, not several "
            "concatenated; leave it out, or give --load one checkpoint"
        )


def check_machine(args):
    cuda = device_from(args.device).type == "cuda"
    if args.precision != "fp32" and not cuda:
        raise UserError(f"--precision {args.precision} needs a CUDA device; use fp32")
    if args.compile:
        check_compilers(cuda)
    if args.nGPU == 0 or args.nGPU < -1:
        raise UserError(f"--nGPU {args.nGPU}: -1 (all) or a number from 1")
    n_gpus = torch.cuda.device_count() if cuda else args.nGPU
    if args.nGPU > n_gpus:
        raise UserError(f"--nGPU {args.nGPU}: PyTorch sees {counted(n_gpus, 'GPU')} here")
    if args.nGPU > 1 and args.only_classif_metric:
        raise UserError(
            f"--nGPU {args.nGPU}: probes of a checkpoint are trained in one process; leave it out"
        )


def check_compilers(cuda):
    """PyTorch needs Triton and a C compiler for a GPU, or a C++ compiler for a CPU."""
    if cuda and importlib.util.find_spec("triton") is None:
        raise UserError(
            "--compile on a GPU needs Triton, which isn't installed here; install it, or leave out "
            "--compile"
        )
    device, language, variable, usual = (
        ("GPU", "C", "CC", ["gcc", "clang"]) if cuda else ("CPU", "C++", "CXX", ["g++"])
    )
    tried = [os.environ[variable]] if variable in os.environ else usual
    if not any(map(shutil.which, tried)):
        raise UserError(
            f"--compile on a {device} needs a {language} compiler, and there is no "
            f"{' or '.join(tried)} here; install one, name it in the environment variable "
            f"{variable}, or leave out --compile"
        )


# ------------------------------------------------------------------------- networks and criterion


def check_window(args):
    frames, rest = divmod(args.sizeWindow, SAMPLES_PER_FRAME)
    if rest:
        raise UserError(
            f"--sizeWindow {args.sizeWindow}: must be a multiple of {SAMPLES_PER_FRAME} samples, "
            f"such as {max(frames, 1) * SAMPLES_PER_FRAME}"
        )


def check_model(args, explicit):
    if args.abspos and args.arMode != "transformer":
        raise UserError("--abspos needs --arMode transformer")
    if args.nLevelsGRU > 1 and args.arMode not in RECURRENT:
        raise UserError(
            f"--nLevelsGRU {args.nLevelsGRU} needs a recurrent --arMode (LSTM, GRU or RNN)"
        )
    if args.hiddenGar != args.hiddenEncoder and args.arMode not in RECURRENT:
        raise UserError(
            f"--hiddenGar {args.hiddenGar}: with --arMode {args.arMode} contexts have the "
            f"encoder's {args.hiddenEncoder} channels; leave it out"
        )
    check_heads("arMode", args)
    if "normMode" in explicit and args.encoder_type != "cpc" and args.normMode != "layerNorm":
        raise UserError(f"--normMode {args.normMode} needs --encoder_type cpc")
    if args.linearOutput and args.encoder_type != "cpc":
        raise UserError(f"--linearOutput needs --encoder_type cpc, not {args.encoder_type}")
    if "initialisation" in explicit and args.encoder_type != "cpc":
        raise UserError(f"--initialisation {args.initialisation} needs --encoder_type cpc")


def check_heads(flag, args):
    if getattr(args, flag) == "transformer" and args.hiddenEncoder % 8:
        raise UserError(
            f"--hiddenEncoder {args.hiddenEncoder}: --{flag} transformer has 8 attention heads, so "
            "it must be a multiple of 8"
        )


def check_criterion(args, explicit):
    if args.supervised or args.cpc_mode == "none":
        other = "--supervised" if args.supervised else "--cpc_mode none"
        refuse_any(explicit & (CPCCTC_ONLY | CONTRASTIVE_ONLY), f"has no effect with {other}")
        if args.cpc_mode == "none" and (args.encoder_type, args.arMode) == ("mfcc", "no_ar"):
            raise UserError(
                "--cpc_mode none with --encoder_type mfcc and --arMode no_ar: nothing to train"
            )
        return
    if not args.CPCCTC:
        refuse_any(explicit & CPCCTC_ONLY, "needs --CPCCTC")
    check_prediction_heads(args)
    check_reach(args)


def check_prediction_heads(args):
    check_heads("rnnMode", args)
    keeps_width = args.rnnMode in ("transformer", "none")
    if keeps_width and args.hiddenGar != args.hiddenEncoder:
        raise UserError(
            f"--rnnMode {args.rnnMode} needs --hiddenGar ({args.hiddenGar}) and --hiddenEncoder "
            f"({args.hiddenEncoder}) to be equal; or choose another --rnnMode, such as linear"
        )
    if keeps_width and args.speakerEmbedding:
        raise UserError(
            f"--speakerEmbedding can't be used with --rnnMode {args.rnnMode}; choose another "
            "--rnnMode, such as linear"
        )
    if args.rnnMode == "none" and args.nPredicts > 1:
        raise UserError(
            f"--rnnMode none: the context itself is the only prediction, so --nPredicts must be 1, "
            f"not {args.nPredicts}"
        )
    if args.multihead_rnn and args.rnnMode != "transformer":
        raise UserError(f"--multihead_rnn needs --rnnMode transformer, not {args.rnnMode}")


def check_reach(args):
    """The predictions must fit into the matched frames, and the frames ahead into the window."""
    extra = args.CPCCTCSelfLoop + args.CPCCTCLearnBlank
    if args.CPCCTC and args.nPredicts + extra > args.CPCCTCNumMatched:
        more = f" and {extra} more (self loop, blank)" if extra else ""
        raise UserError(
            f"--nPredicts {args.nPredicts}{more}: can't be aligned to --CPCCTCNumMatched "
            f"{args.CPCCTCNumMatched} frames; give at most as many predictions as matched frames"
        )
    frames = args.sizeWindow // SAMPLES_PER_FRAME
    farthest = "CPCCTCNumMatched" if args.CPCCTC else "nPredicts"
    reach = getattr(args, farthest)
    if reach >= frames:
        raise UserError(
            f"--{farthest} {reach}: a window of --sizeWindow {args.sizeWindow} has {frames} "
            f"frames, so it must be under {frames}"
        )


def check_supervised(args, explicit):
    if not args.supervised:
        refuse_any(explicit & SUPERVISED_ONLY, "needs --supervised")
        return
    if args.onlyCapture or args.only_classif_metric:
        return  # what a model was trained to classify matters only during training
    if args.CTC and not args.path_phone_data:
        raise UserError("--CTC needs --path_phone_data FILE")
    if args.CTC and args.onEncoder:
        raise UserError(
            "--onEncoder can't be used with --CTC: the CTC phone classifier reads contexts"
        )
    if not args.path_phone_data and (args.nLevelsPhone > 1 or args.onEncoder):
        raise UserError("--nLevelsPhone and --onEncoder need --path_phone_data FILE")
    if args.cpc_mode:
        raise UserError("--supervised replaces CPC: leave out --cpc_mode")


def check_augmentation(args, explicit):
    if not args.augment_type:
        refuse_any(explicit & AUGMENTATION, "needs --augment_type, such as pitch additive reverb")
        return
    if not args.augment_past and not args.augment_future:
        raise UserError("--augment_type needs --augment_past, --augment_future or both")
    if args.past_equal_future and not args.augment_past:
        raise UserError("--past_equal_future needs --augment_past")
    if args.cpc_mode == "none" or (args.supervised and args.augment_future):
        flag, other = (
            ("type", "cpc_mode none") if args.cpc_mode == "none" else ("future", "supervised")
        )
        raise UserError(f"--augment_{flag} has no effect with --{other}")
    if args.samplingType == "sequential" and args.augment_prob < 1:
        raise UserError(
            f"--augment_prob {args.augment_prob}: with --samplingType sequential, the same part of "
            "the corpus would always stay clean; leave it out"
        )
    used = {effect for kind in args.augment_type for effect in AUGMENT_TYPES[kind]}
    for name in sorted(explicit & EFFECT_OF.keys()):
        if EFFECT_OF[name] not in used:
            raise UserError(f"--{name} needs --augment_type {EFFECT_OF[name]}")
    if "natural_reverb" in used and not args.pathImpulseResponses:
        raise UserError("--augment_type natural_reverb needs --pathImpulseResponses DIR")
    if args.pathSeqNoise and not args.pathDBNoise:
        raise UserError("--pathSeqNoise needs --pathDBNoise DIR")
    if args.additive_noise_snr is not None and {*SNR_RANGE} & explicit:
        raise UserError("--additive_noise_snr replaces --min_snr_in_db and --max_snr_in_db")
    if args.min_snr_in_db > args.max_snr_in_db:
        raise UserError(f"--min_snr_in_db {args.min_snr_in_db}: above --max_snr_in_db")
    if "time_dropout" in used and SAMPLE_RATE * args.t_ms // 1000 > args.sizeWindow:
        raise UserError(f"--t_ms {args.t_ms}: longer than a window, --sizeWindow")


# ----------------------------------------------------------------------------- probes and capture


def check_probes(args, explicit):
    if not args.unit_quality_each_epochs:
        refuse_any(explicit & {"nClusters"}, "needs --unit_quality_each_epochs N")
        if not args.supervised_classif_metric:
            probes = "needs --supervised_classif_metric or --unit_quality_each_epochs N"
            refuse_any(explicit & {"level"}, probes)
    if not args.supervised_classif_metric:
        refuse_any(explicit & PROBE_GROUP, "needs --supervised_classif_metric")
        return
    if args.onlyCapture:
        return
    asked_by = f"--{'only' if args.only_classif_metric else 'supervised'}_classif_metric"
    if not args.speaker_sep and not args.path_phone_data:
        raise UserError(
            f"{asked_by} needs --speaker_sep, --path_phone_data FILE or both, to choose the probes"
        )
    if not args.path_phone_data:
        needs_labels = {"CTCphones", "phone_get_encoded"}
        refuse_any(explicit & needs_labels, "needs --path_phone_data FILE")
    if args.CTCphones and args.phone_get_encoded:
        raise UserError(
            "--CTCphones can't be used with --phone_get_encoded: the CTC phone probe reads contexts"
        )
    check_probe_flags(args, "--CTCphones" if args.CTCphones else None)
    if not args.linsep_logs_dir:
        raise UserError(f"{asked_by} needs --linsep_logs_dir DIR")


def check_capture(args, explicit):
    if not args.pathCaptureDS:
        if args.onlyCapture:
            raise UserError(
                "--onlyCapture needs --pathCaptureDS FILE, the list of utterances to capture"
            )
        refuse_any(explicit & CAPTURE_GROUP, "needs --pathCaptureDS FILE")
    if not args.pathCaptureDS or args.only_classif_metric:
        return
    if not captured(args) and not args.captureSetStats:
        raise UserError(
            "--pathCaptureDS: nothing to capture; give --captureEverything, or one or more of "
            f"{', '.join('--' + name for name in sorted(CAPTURED_BY))}, or --captureSetStats"
        )
    if not args.pathCaptureSave:
        refuse_any(captured(args), "needs --pathCaptureSave DIR")
    if args.captureDSfreq is not None and args.captureDStotNr is not None:
        raise UserError("--captureDSfreq and --captureDStotNr: choose one of them")
    if args.capturePhoneAlign and not args.path_phone_data:
        raise UserError("--capturePhoneAlign needs --path_phone_data FILE")
    if not args.CPCCTC:
        refuse_any({name for name in captured(args) if "CPCCTC" in name}, "needs --CPCCTC")
    if not args.multiLevel:
        refuse_any({name for name in captured(args) if "Seg" in name}, "needs --multiLevel")
    if not predicts_frames(args):
        of_predictions = {name for name in captured(args) if "CPCCTC" in name} | {"capturePred"}
        refuse_any(
            of_predictions & {*captured(args)},
            "has no effect: this run makes no predictions of frames",
        )


# ------------------------------------------------------------------------------------------ paths


def check_paths(args, resumed):
    """The paths that this call reads must exist, and those that it writes must be writable."""
    read, directories = {"path_phone_data"}, ()
    if not args.onlyCapture and not args.only_classif_metric:
        read, directories = {*read, "pathSeqNoise"}, RECORDINGS
    if not args.onlyCapture:
        read |= {"pathTrain", "pathVal"}
    if not args.only_classif_metric:
        read |= {"pathCaptureDS"}
    names = {"pathDB", *read, *directories}
    paths = {f"--{name} {getattr(args, name)}": getattr(args, name) for name in names}
    gone = sorted(flag for flag, path in paths.items() if path and not os.path.exists(path))
    if len(gone) > 1:
        raise UserError(
            f"no such files: {', '.join(gone)}; if they were moved, name them all again"
        )
    check_database(args, resumed)
    if directories:
        check_recordings(args)
    for name in sorted(read):
        check_file(f"--{name}", getattr(args, name))
    written = set()
    if args.pathCaptureDS and not args.only_classif_metric:
        written |= {"pathCaptureSave"}
    if args.supervised_classif_metric and not args.onlyCapture:
        written |= {"linsep_logs_dir", "linsep_checkpoint_dir"}
    for name in sorted(written):
        path = getattr(args, name)
        if path:
            check_writable(path, f"--{name} {path}: results")


def check_database(args, resumed):
    if not args.pathDB and args.restart:
        raise UserError(
            "--restart begins a new run, which needs --pathDB DIR and all its other flags again"
        )
    if not args.pathDB and not resumed:
        raise UserError(
            f"--pathCheckpoint {args.pathCheckpoint}: no run there to resume; a new one needs "
            "--pathDB DIR"
        )
    if not args.pathDB:
        raise UserError(f"{args.pathCheckpoint} doesn't say where its audio is: give --pathDB DIR")
    if not os.path.isdir(args.pathDB):
        raise UserError(f"--pathDB {args.pathDB}: no such directory")


def check_recordings(args):
    for name in RECORDINGS:
        path = getattr(args, name)
        if path and not os.path.isdir(path):
            raise UserError(f"--{name} {path}: no such directory")


def check_file(flag, path):
    if path and os.path.isdir(path):
        labels = labels_in(path) if flag == "--path_phone_data" else None
        hint = f"its phone labels are {labels}" if labels else "give a file"
        raise UserError(f"{flag} {path}: is a folder; {hint}")
    if path and not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file")


def labels_in(folder):
    """The phone labels in a folder of converted alignments, or None."""
    labels = os.path.join(folder, "converted_aligned_phones.txt")
    return labels if os.path.isfile(labels) else None
