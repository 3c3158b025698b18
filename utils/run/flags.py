"""The command line of train.py: every flag, its default, its class, and the rules between flags.

Names and defaults are those of the original program. What happens to a flag when a run goes on
from a checkpoint depends on its class; each flag is in exactly one:

- ARCHITECTURE: what the networks are. Always the checkpoint's.
- ORDER: what defines the order of the data. The checkpoint's when a run is resumed.
- PER_CALL: what concerns this call of the program alone. Never the checkpoint's.
- INHERITED: the command line's where it is given there, else the checkpoint's.
"""

import importlib.util
import math
import os
import shutil

import torch

from utils.files import check_writable
from utils.misc import SAMPLES_PER_FRAME, UserError, counted
from utils.run.command import CommandLine
from utils.run.machine import device_from


def names(text):
    return frozenset(text.split())


ARCHITECTURE = names(
    """hiddenEncoder hiddenGar nPredicts CPCCTC CPCCTCNumMatched CPCCTCSkipBeg CPCCTCSkipEnd
    CPCCTCSelfLoop CPCCTCLearnBlank CPCCTCNoNegsMatchWin CPCCTCMasq CPCCTCLossTemp
    CPCCTCNormalizeEncs CPCCTCNormalizePreds limitNegsInBatch negativeSamplingExt sizeWindow
    cpc_mode encoder_type normMode speakerEmbedding arMode nLevelsGRU rnnMode dropout abspos
    supervised CTC nLevelsPhone onEncoder"""
)
MODEL = names(  # the part of it that describes encoder and AR network
    """hiddenEncoder hiddenGar encoder_type normMode arMode nLevelsGRU abspos cpc_mode sizeWindow"""
)
ORDER = names("random_seed batchSizeGPU samplingType max_size_loaded pathTrain pathVal")
PER_CALL = names(
    """pathCheckpoint restart onlyCapture only_classif_metric debug load loadCriterion gru_level
    nullspace nGPU device precision compile threads n_process_loader ignore_cache resume_every"""
)
CAPTURED_BY = {  # flag -> name of what it captures (utils/capture.py)
    "captureConvRepr": "conv_repr",
    "captureCtxRepr": "ctx_repr",
    "captureSpeakerAlign": "speaker_align",
    "capturePhoneAlign": "phone_align",
    "capturePred": "pred",
    "captureCPCCTCalign": "cpcctc_align",
    "captureCPCCTClogScores": "cpcctc_log_scores",
}
CAPTURE = CAPTURED_BY.keys() | {"captureEverything"}
CAPTURE_GROUP = CAPTURE | names(
    """pathCaptureDS captureDSfreq captureDStotNr pathCaptureSave captureEachEpochs
    captureSetStats"""
)
PROBE_GROUP = names(
    """supervised_classif_metric speaker_sep CTCphones linsepBatchSizeGPU linsep_n_epoch
    phone_get_encoded linsep_lr linsep_beta1 linsep_beta2 linsep_epsilon linsep_logs_dir
    linsep_checkpoint_dir linsep_task_logging_step linsep_classif_each_epochs linsep_net_layers"""
)
INHERITED = (
    CAPTURE_GROUP
    | PROBE_GROUP
    | names(
        """pathDB file_extension path_phone_data nEpoch learningRate schedulerStep schedulerRamp
        beta1 beta2 epsilon clip_grad_norm logging_step save_step keep max_bad_files"""
    )
)
FILES = names("pathTrain pathVal pathCaptureDS path_phone_data")
PATHS = FILES | names("pathDB pathCaptureSave pathCheckpoint linsep_logs_dir linsep_checkpoint_dir")
CONTRASTIVE_ONLY = names("CPCCTC limitNegsInBatch speakerEmbedding dropout")
CPCCTC_ONLY = frozenset(name for name in ARCHITECTURE if name.startswith("CPCCTC")) - {"CPCCTC"}


# ------------------------------------------------------------------------------------ the flags
# A flag in two lines reads better than in seven, hence:
# fmt: off



def build_parser():
    """The parser of train.py, with every flag and its default."""
    parser = CommandLine(
        prog="train.py",
        description="Train Contrastive Predictive Coding (CPC) or its aligned variant CPC-CTC on "
        "speech; probe and capture what it learned. README.md shows how.",
    )
    add_data_flags(parser.add_argument_group("data"))
    add_checkpoint_flags(parser.add_argument_group("checkpoints and what to do with them"))
    add_optimisation_flags(parser.add_argument_group("optimisation"))
    add_model_flags(parser.add_argument_group("model"))
    add_criterion_flags(parser.add_argument_group("criterion"))
    add_cpcctc_flags(parser.add_argument_group("CPC-CTC"))
    add_supervised_flags(parser.add_argument_group("supervised training"))
    add_probe_flags(parser.add_argument_group("linear separability (probes)"))
    add_capture_flags(parser.add_argument_group("capture and stats"))
    add_machine_flags(parser.add_argument_group("machine"))
    return parser


def add_data_flags(group):
    add = group.add_argument
    add("--pathDB", metavar="DIR", help="root of the audio: speaker/.../sequence + extension")
    add("--file_extension", default=".flac", metavar="EXT", help="end of the audio files' names")
    add("--pathTrain", metavar="FILE", help="list of the training sequences, a name a line, "
        "without extension (default: every sequence)")
    add("--pathVal", metavar="FILE", help="list of the validation sequences (default: 1 %% of the "
        "training sequences are set aside)")
    add("--path_phone_data", metavar="FILE", help="phone labels, `name label label ...` a line, a "
        "label for each 10 ms: for phone probes, phone capture and supervised training")
    add("--sizeWindow", type=int, default=20480, metavar="SAMPLES",
        help="length of a training window, a multiple of 160")
    add("--samplingType", default="samespeaker",
        choices=["samespeaker", "uniform", "samesequence", "sequential"], help="where the windows "
        "of a batch come from; with `sequential` the AR network keeps its hidden state from one "
        "batch to the next")
    add("--max_size_loaded", type=int, default=4_000_000_000, metavar="SAMPLES",
        help="training audio held in memory at once, 2 bytes a sample; lower it when memory is "
        "short: a larger corpus is then read in packs, the next one in the background")
    add("--max_bad_files", type=float, default=0.01, metavar="SHARE",
        help="stop when more than this share of the files can't be decoded; unless it is 0, a "
        "quarter of them may be bad in any case, but no more than three, and always one")
    add("--ignore_cache", action="store_true",
        help="list the audio files anew; needed when files were added or removed")
    add("--debug", action="store_true",
        help="use the last 1000 training and the last 100 validation sequences only")


def add_checkpoint_flags(group):
    add = group.add_argument
    add("--pathCheckpoint", metavar="DIR", help="where checkpoints, logs and pictures go; a run "
        "found there is resumed, and needs no other flag. A .pt file is taken too, with "
        "--onlyCapture or --only_classif_metric")
    add("--restart", action="store_true", help="begin anew even if there is a checkpoint; the old "
        "ones stay until the first new one is written")
    add("--load", nargs="+", metavar="FILE",
        help="start from these checkpoints' weights; the features of several are concatenated. A "
        "directory stands for its newest checkpoint")
    add("--loadCriterion", action="store_true",
        help="take the criterion's weights from the first checkpoint, too (needs --load)")
    add("--gru_level", type=int, default=-1, metavar="N",
        help="keep only the first N layers of the loaded AR network; needs --load (default: all)")
    add("--nullspace", action="store_true",
        help="the loaded checkpoint is one of a null-space model (needs --load)")
    add("--save_step", type=int, default=5, metavar="EPOCHS", help="epochs between checkpoints")
    add("--keep", type=int, default=0, metavar="N", help="keep only the last N "
        "checkpoint_<epoch>.pt and that of the best epoch; the others go when a new one is written "
        "(0: keep all)")
    add("--resume_every", type=int, default=500, metavar="STEPS", help="training steps between "
        "saves of checkpoint_resume.pt, from which a killed run goes on inside an epoch (0: only "
        "when asked to stop)")
    add("--logging_step", type=int, default=1000, metavar="STEPS",
        help="training steps between lines of running means")
    add("--onlyCapture", action="store_true", help="capture once with the model of "
        "--pathCheckpoint, without training (needs --pathDB and --pathCaptureDS)")
    add("--only_classif_metric", action="store_true",
        help="run the probes once on the model of --pathCheckpoint, without training")


def add_optimisation_flags(group):
    add = group.add_argument
    add("--nEpoch", type=int, default=200, metavar="N",
        help="epochs in all; a resumed run goes on up to it")
    add("--batchSizeGPU", type=int, default=8, metavar="WINDOWS",
        help="windows in a batch, for each process")
    add("--learningRate", type=float, default=2e-4, metavar="RATE", help="Adam's learning rate")
    add("--beta1", type=float, default=0.9, metavar="B", help="Adam's beta 1")
    add("--beta2", type=float, default=0.999, metavar="B", help="Adam's beta 2")
    add("--epsilon", type=float, default=1e-8, metavar="EPS", help="Adam's epsilon")
    add("--schedulerStep", type=int, default=-1, metavar="EPOCHS",
        help="halve the learning rate every so many epochs (default: never)")
    add("--schedulerRamp", type=int, metavar="EPOCHS",
        help="raise the learning rate linearly over the first epochs; helps a deep model start")
    add("--clip_grad_norm", type=float, metavar="NORM", help="scale a gradient whose norm, "
        "over all weights, is above this down to it; helps where losses jump (default: never)")
    add("--random_seed", type=int, metavar="SEED",
        help="seed of everything random (default: drawn, and kept in the checkpoint)")


def add_model_flags(group):
    add = group.add_argument
    add("--encoder_type", default="cpc", choices=["cpc", "mfcc", "lfb"],
        help="waveform -> frames: five convolutions, MFCCs, or learnable filter banks")
    add("--hiddenEncoder", type=int, default=256, metavar="E", help="channels of the encoder")
    add("--normMode", default="layerNorm", choices=["instanceNorm", "ID", "layerNorm", "batchNorm"],
        help="normalisation inside the convolutional encoder (ID: none)")
    add("--arMode", default="LSTM", choices=["GRU", "LSTM", "RNN", "no_ar", "transformer"],
        help="autoregressive network, encoded frames -> contexts")
    add("--hiddenGar", type=int, default=256, metavar="C",
        help="channels of the AR network (no_ar and transformer: those of the encoder)")
    add("--nLevelsGRU", type=int, default=1, metavar="N", help="layers of the recurrent AR network")
    add("--abspos", action="store_true",
        help="absolute instead of relative positions (needs --arMode transformer)")


def add_criterion_flags(group):
    add = group.add_argument
    add("--cpc_mode", choices=["reverse", "none"],
        help="reverse: predict the past from the future; none: no loss, nothing is learned")
    add("--nPredicts", type=int, default=12, metavar="K", help="predictions at each position")
    add("--negativeSamplingExt", type=int, default=128, metavar="N",
        help="negatives drawn for each position")
    add("--limitNegsInBatch", type=int, default=0, metavar="ROWS", help="draw negatives only from "
        "groups of so many rows of the batch: harder, and less of speaker than of phone (0: from "
        "all rows)")
    add("--rnnMode", default="transformer",
        choices=["transformer", "RNN", "LSTM", "linear", "ffd", "conv4", "conv8", "conv12"],
        help="prediction heads, one for each prediction; linear is by far the fastest")
    add("--dropout", action="store_true", help="dropout of 0.5 on the predictions")
    add("--speakerEmbedding", type=int, default=0, metavar="D",
        help="size of a learned speaker vector given to the heads (0: none)")


def add_cpcctc_flags(group):
    add = group.add_argument
    add("--CPCCTC", action="store_true", help="align the K predictions to the next M frames "
        "instead of tying prediction k to frame k (Chorowski et al., Interspeech 2021)")
    add("--CPCCTCNumMatched", type=int, default=16, metavar="M",
        help="frames that the predictions are aligned to; at least the number of predictions")
    add("--CPCCTCSkipBeg", type=int, default=0, metavar="N",
        help="that many predictions may be left out at the beginning")
    add("--CPCCTCSkipEnd", type=int, default=0, metavar="N",
        help="that many predictions may be left out at the end")
    add("--CPCCTCSelfLoop", action="store_true",
        help="the present frame is a further prediction, before the first")
    add("--CPCCTCLearnBlank", action="store_true", help="a learned blank that any frame may take")
    add("--CPCCTCNoNegsMatchWin", action="store_true",
        help="draw no negatives from the matched frames (all but the last of them)")
    add("--CPCCTCMasq", default="", metavar="RULES", help="pairs that can't be aligned, as "
        "a:b:c:d,...: matched frames a to b - 1 with predictions c to d - 1, counted from 0 "
        "(`none`: no bound). So 0:4:6:none leaves the first four frames to the first six "
        "predictions")
    add("--CPCCTCLossTemp", type=float, default=1.0, metavar="T",
        help="temperature of the alignment; above 1 it is softer")
    add("--CPCCTCNormalizeEncs", action="store_true", help="normalise the encoded frames")
    add("--CPCCTCNormalizePreds", action="store_true", help="normalise the predictions")


def add_supervised_flags(group):
    add = group.add_argument
    add("--supervised", action="store_true", help="train the whole network to name phones (with "
        "--path_phone_data) or speakers (without), instead of CPC")
    add("--CTC", action="store_true", help="phones by CTC: their order counts, not their frames")
    add("--nLevelsPhone", type=int, default=1, metavar="N", help="layers of the phone classifier")
    add("--onEncoder", action="store_true", help="classify encoded frames instead of contexts")


def add_probe_flags(group):
    add = group.add_argument
    add("--supervised_classif_metric", action="store_true",
        help="train probes on the frozen features during training")
    add("--speaker_sep", action="store_true", help="probe for speakers")
    add("--CTCphones", action="store_true", help="phone probe by CTC; reports phone error rate")
    add("--phone_get_encoded", action="store_true",
        help="phone probe on encoded frames instead of contexts")
    add("--linsep_classif_each_epochs", type=int, default=20, metavar="EPOCHS",
        help="probe at epochs N, 2N, ... (counted from 0; never at epoch 0)")
    add("--linsep_n_epoch", type=int, default=10, metavar="N", help="epochs of a probe")
    add("--linsepBatchSizeGPU", type=int, default=8, metavar="WINDOWS", help="a probe's batch")
    add("--linsep_net_layers", type=int, default=1, metavar="N", help="layers of a probe")
    add("--linsep_lr", type=float, default=2e-4, metavar="RATE", help="learning rate of a probe")
    add("--linsep_beta1", type=float, default=0.9, metavar="B", help="Adam's beta 1 in a probe")
    add("--linsep_beta2", type=float, default=0.999, metavar="B", help="Adam's beta 2 in a probe")
    add("--linsep_epsilon", type=float, default=2e-8, metavar="EPS",
        help="Adam's epsilon in a probe")
    add("--linsep_logs_dir", metavar="DIR", help="where the probes' logs go")
    add("--linsep_checkpoint_dir", metavar="DIR",
        help="where the best classifiers go (default: they aren't kept)")
    add("--linsep_task_logging_step", type=int, default=1, metavar="EPOCHS",
        help="a probe's epochs between writes of its log")


def add_capture_flags(group):
    add = group.add_argument
    add("--pathCaptureDS", metavar="FILE", help="list of the sequences to capture")
    add("--captureDSfreq", type=int, metavar="PERCENT", help="capture this share of that list, "
        "spread evenly over it")
    add("--captureDStotNr", type=int, metavar="N", help="capture N sequences of that list, "
        "spread evenly over it")
    add("--pathCaptureSave", metavar="DIR",
        help="captures go to DIR/<epoch>/<what>/ (not needed for stats alone)")
    add("--captureEachEpochs", type=int, default=10, metavar="EPOCHS",
        help="capture at epochs 0, N, 2N, ...")
    add("--captureEverything", action="store_true", help="all of the following that apply")
    for flag, what in {
        "captureConvRepr": "encoded frames (B, S, E)",
        "captureCtxRepr": "contexts (B, S, C)",
        "captureSpeakerAlign": "speaker numbers (B,)",
        "capturePhoneAlign": "phone labels (B, S) (needs --path_phone_data)",
        "capturePred": "predictions (B, W, E, P)",
        "captureCPCCTCalign": "alignments (B, W, M) (needs --CPCCTC)",
        "captureCPCCTClogScores": "log scores of frames and predictions (B, W, M, P) "
        "(needs --CPCCTC)",
    }.items():
        add(f"--{flag}", action="store_true", help=what)
    add("--captureSetStats", metavar="SPEC", help="statistics over the captured set: "
        "reprDiff:METRIC,REPR,STEP,DIRECTORY, boundaries:METRIC,REPR,DIRECTORY, "
        "alignOccupancy:DIRECTORY or phoneSim:REPR,DIRECTORY, or several with `_` between them. "
        "REPR is conv_repr or ctx_repr, METRIC such as cosine; pictures go to DIRECTORY")


def add_machine_flags(group):
    add = group.add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"],
        help="auto: CUDA where there is one")
    add("--nGPU", type=int, default=-1, metavar="N",
        help="processes on this machine, each with a GPU and batches of its own, or with its share "
        "of the CPU (default: one for each GPU). Under torchrun: as many as that started")
    add("--precision", default="fp32", choices=["fp32", "tf32", "bf16"],
        help="arithmetic of the products; tf32 and bf16 need CUDA")
    add("--compile", action="store_true", help="compile encoder and criterion and, on "
        "a single GPU, record a step's kernels and replay them (slower start)")
    add("--threads", type=int, default=0, metavar="N",
        help="CPU threads of each process for computing (default: PyTorch's choice, shared out)")
    add("--n_process_loader", type=int, default=8, metavar="N", help="threads that decode audio")



# fmt: on
# ----------------------------------------------------------- the command line and the checkpoint


def parse_arguments(argv):
    """Read the command line alone. Returns the arguments and the names of the flags given there.

    Relative paths are made absolute, so that a run can be resumed from any directory.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    unset = object()
    parser.set_defaults(**dict.fromkeys(vars(args), unset))
    given = {name for name, value in vars(parser.parse_args(argv)).items() if value is not unset}
    for name in PATHS:
        if getattr(args, name) is not None:
            setattr(args, name, absolute(getattr(args, name), f"--{name}"))
    args.load = [absolute(path, "--load") for path in args.load] if args.load else None
    check_mode(args, given)
    check_machine(args)
    return args, given


def absolute(path, flag):
    """The absolute path. Raises UserError where it is empty, as from a variable that isn't set."""
    refuse_if(not path, f"{flag}: an empty path; is a variable of the shell not set?")
    return os.path.abspath(path)


def stored_arguments(stored, source):
    """The arguments kept in a checkpoint (a dict) as a namespace, defaults filled in.

    They are read as a command line is, so that a damaged value is refused, by name and `source`,
    like a mistyped one. What this program doesn't know, such as a newer flag, is left out.
    """
    parser = build_parser()
    words = []
    for name in sorted((ARCHITECTURE | ORDER | INHERITED) & stored.keys()):
        value = stored[name]
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words.append(f"--{name}={value}")
    try:
        return parser.parse_args(words)
    except UserError as error:
        raise UserError(f"{source}: its stored arguments can't be used: {error}") from error


# ------------------------------------------------------------------------------ what they ask for


def capturable_names(args):
    """Names of all that can be captured in such a run."""
    available = ["conv_repr", "ctx_repr", "speaker_align"]
    if args.path_phone_data:
        available.append("phone_align")
    if args.cpc_mode != "none" and not args.supervised:
        available.append("pred")
        if args.CPCCTC:
            available += ["cpcctc_align", "cpcctc_log_scores"]
    return available


def captured_names(args):
    """Names of what the flags say is to be captured, in a fixed order."""
    if args.captureEverything:
        return capturable_names(args)
    return [name for flag, name in CAPTURED_BY.items() if getattr(args, flag)]


# ------------------------------------------------------------------------ rules between the flags

AT_LEAST = {
    0: names(
        """CPCCTCSkipBeg CPCCTCSkipEnd limitNegsInBatch speakerEmbedding nEpoch learningRate
        epsilon linsep_lr linsep_epsilon resume_every keep threads max_bad_files"""
    ),
    1: names(
        """hiddenGar nPredicts CPCCTCNumMatched negativeSamplingExt sizeWindow
        batchSizeGPU max_size_loaded nLevelsGRU nLevelsPhone schedulerRamp save_step logging_step
        n_process_loader linsepBatchSizeGPU linsep_n_epoch linsep_net_layers
        linsep_task_logging_step linsep_classif_each_epochs captureDSfreq captureDStotNr
        captureEachEpochs"""
    ),
    2: names("hiddenEncoder"),  # a norm over a single channel would be zero everywhere
}
MOST_THREADS = 1024  # far more end the process in the C library, without a word
BETAS = ("beta1", "beta2", "linsep_beta1", "linsep_beta2")


def check_arguments(args, given, resumed=False, began_with_load=False):
    """Refuse what can't work, before audio is looked for. Completes what follows from other flags.

    `given` holds the flags that the user has a say in: contradictions are judged between these.
    `resumed`: the run goes on from a checkpoint. `began_with_load`: its model wasn't built from
    these flags, which tell only the widths of its features. Raises UserError with the flag and the
    cure.
    """
    check_numbers(args)
    check_window(args)
    if not began_with_load:
        check_model(args, given)
    check_criterion(args, given)
    check_supervised(args, given)
    check_probes(args, given)
    check_capture(args, given)
    check_paths(args, resumed)


def refuse_if(condition, message):
    if condition:
        raise UserError(message)


def refuse_without(flag, available, candidates, given):
    """Refuse those flags of `candidates` that were given although what they need isn't there."""
    useless = sorted(given & candidates)
    refuse_if(useless and not available, f"--{useless[0] if useless else ''} needs {flag}")


def check_numbers(args):
    for name, value in vars(args).items():
        refuse_if(
            isinstance(value, float) and not math.isfinite(value),
            f"--{name} {value}: must be a finite number",
        )
    for lowest, flags in AT_LEAST.items():
        for name in sorted(flags):
            value = getattr(args, name)
            refuse_if(
                value is not None and not value >= lowest,
                f"--{name} {value}: must be at least {lowest}",
            )
    for name in BETAS:
        refuse_if(
            not 0 <= getattr(args, name) < 1, f"--{name} {getattr(args, name)}: must be in [0, 1)"
        )
    refuse_if(not args.CPCCTCLossTemp > 0, "--CPCCTCLossTemp: must be above 0")
    refuse_if(
        args.clip_grad_norm is not None and not args.clip_grad_norm > 0,
        f"--clip_grad_norm {args.clip_grad_norm}: must be above 0",
    )
    refuse_if(args.max_bad_files > 1, "--max_bad_files: a share, so at most 1")
    refuse_if(
        args.random_seed is not None and not 0 <= args.random_seed < 2**63,
        "--random_seed: must be from 0 to 2^63 - 1",
    )


def check_mode(args, given):
    """What the call is for, judged before a checkpoint is looked for."""
    refuse_if(
        args.onlyCapture and args.only_classif_metric,
        "--onlyCapture and --only_classif_metric: choose one of them",
    )
    for mode, other, reason in (
        ("onlyCapture", PROBE_GROUP, "runs no probe; --only_classif_metric does"),
        ("only_classif_metric", CAPTURE_GROUP, "captures nothing; --onlyCapture does"),
    ):
        if not getattr(args, mode):
            continue
        refuse_if(
            args.restart or args.load,
            f"--{mode} takes its model from --pathCheckpoint DIR (a run) or FILE (a checkpoint): "
            "leave out --restart, --load and --loadCriterion",
        )
        useless = sorted(given & other)
        refuse_if(useless, f"--{useless[0] if useless else ''}: --{mode} {reason}")
    refuse_if(
        not args.pathCheckpoint,
        "--pathCheckpoint DIR is needed: where the run is kept, or a run to go on with",
    )
    if not args.load:
        for name in ("loadCriterion", "nullspace"):
            refuse_if(getattr(args, name), f"--{name} needs --load")
        refuse_if(args.gru_level > 0, "--gru_level needs --load")
    refuse_if(
        args.loadCriterion and len(args.load) > 1,
        "--loadCriterion: a criterion fits the one model that it was trained with, not several "
        "side by side; leave it out, or give --load one checkpoint",
    )


def check_window(args):
    frames, rest = divmod(args.sizeWindow, SAMPLES_PER_FRAME)
    refuse_if(
        rest,
        f"--sizeWindow {args.sizeWindow}: must be a multiple of {SAMPLES_PER_FRAME} samples, "
        f"such as {max(frames, 1) * SAMPLES_PER_FRAME}",
    )


def check_model(args, given):
    refuse_if(args.abspos and args.arMode != "transformer", "--abspos needs --arMode transformer")
    recurrent = args.arMode in ("LSTM", "GRU", "RNN")
    refuse_if(
        args.nLevelsGRU > 1 and not recurrent,
        f"--nLevelsGRU {args.nLevelsGRU} needs a recurrent --arMode (LSTM, GRU or RNN)",
    )
    if not recurrent:
        refuse_if(
            "hiddenGar" in given and args.hiddenGar != args.hiddenEncoder,
            f"--hiddenGar {args.hiddenGar}: with --arMode {args.arMode} contexts have the "
            f"encoder's {args.hiddenEncoder} channels; leave it out",
        )
        args.hiddenGar = args.hiddenEncoder
    check_heads("arMode", args)
    refuse_if(
        "normMode" in given and args.encoder_type != "cpc" and args.normMode != "layerNorm",
        f"--normMode {args.normMode} needs --encoder_type cpc",
    )


def check_heads(flag, args):
    refuse_if(
        getattr(args, flag) == "transformer" and args.hiddenEncoder % 8,
        f"--hiddenEncoder {args.hiddenEncoder}: --{flag} transformer has 8 attention heads, so it "
        "must be a multiple of 8",
    )


def check_criterion(args, given):
    without = "--supervised" if args.supervised else "--cpc_mode none"
    if args.supervised or args.cpc_mode == "none":
        useless = sorted(given & (CPCCTC_ONLY | CONTRASTIVE_ONLY))
        refuse_if(useless, f"--{useless[0] if useless else ''} has no effect with {without}")
        refuse_if(
            args.cpc_mode == "none" and (args.encoder_type, args.arMode) == ("mfcc", "no_ar"),
            "--cpc_mode none with --encoder_type mfcc and --arMode no_ar: nothing to train",
        )
        return
    refuse_without("--CPCCTC", args.CPCCTC, CPCCTC_ONLY, given)
    check_heads("rnnMode", args)
    if args.rnnMode == "transformer":
        refuse_if(
            args.hiddenGar != args.hiddenEncoder,
            f"--rnnMode transformer needs --hiddenGar ({args.hiddenGar}) and --hiddenEncoder "
            f"({args.hiddenEncoder}) to be equal; or choose another --rnnMode, such as linear",
        )
        refuse_if(
            args.speakerEmbedding,
            "--speakerEmbedding can't be used with --rnnMode transformer; choose another "
            "--rnnMode, such as linear",
        )
    check_reach(args)


def check_reach(args):
    """The predictions must fit in the matched frames, and what is predicted in the window."""
    frames = args.sizeWindow // SAMPLES_PER_FRAME
    extra = args.CPCCTCSelfLoop + args.CPCCTCLearnBlank
    reach, name = (
        (args.CPCCTCNumMatched, "CPCCTCNumMatched")
        if args.CPCCTC
        else (args.nPredicts, "nPredicts")
    )
    refuse_if(
        args.CPCCTC and args.nPredicts + extra > args.CPCCTCNumMatched,
        f"--nPredicts {args.nPredicts}{f' and {extra} more (self loop, blank)' if extra else ''}: "
        f"can't be aligned to --CPCCTCNumMatched {args.CPCCTCNumMatched} frames; give at most as "
        "many predictions as matched frames",
    )
    refuse_if(
        reach >= frames,
        f"--{name} {reach}: a window of --sizeWindow {args.sizeWindow} has {frames} frames, so "
        f"it must be under {frames}",
    )


def check_supervised(args, given):
    refuse_without("--supervised", args.supervised, names("CTC nLevelsPhone onEncoder"), given)
    if not args.supervised or args.onlyCapture or args.only_classif_metric:
        return  # what a model was trained to name matters only while it is
    refuse_if(args.CTC and not args.path_phone_data, "--CTC needs --path_phone_data FILE")
    refuse_if(
        args.CTC and args.onEncoder,
        "--onEncoder can't be used with --CTC: phones by CTC are read from the contexts",
    )
    refuse_if(
        not args.path_phone_data and (args.nLevelsPhone > 1 or args.onEncoder),
        "--nLevelsPhone and --onEncoder need --path_phone_data FILE",
    )
    refuse_if(args.cpc_mode, "--supervised replaces CPC: leave out --cpc_mode")


def check_probes(args, given):
    if args.only_classif_metric:
        args.supervised_classif_metric = True
    refuse_without(
        "--supervised_classif_metric", args.supervised_classif_metric, PROBE_GROUP, given
    )
    if not args.supervised_classif_metric or args.onlyCapture:
        return
    asked_by = f"--{'only' if args.only_classif_metric else 'supervised'}_classif_metric"
    refuse_if(
        not args.speaker_sep and not args.path_phone_data,
        f"{asked_by} needs --speaker_sep, --path_phone_data FILE or both, to say what is probed",
    )
    refuse_without(
        "--path_phone_data FILE", args.path_phone_data, names("CTCphones phone_get_encoded"), given
    )
    refuse_if(
        args.CTCphones and args.phone_get_encoded,
        "--CTCphones can't be used with --phone_get_encoded: phones by CTC are read from the "
        "contexts",
    )
    refuse_if(not args.linsep_logs_dir, f"{asked_by} needs --linsep_logs_dir DIR")


def check_capture(args, given):
    refuse_if(
        args.onlyCapture and not args.pathCaptureDS,
        "--onlyCapture needs --pathCaptureDS FILE, the list of sequences to capture",
    )
    refuse_without("--pathCaptureDS FILE", args.pathCaptureDS, CAPTURE_GROUP, given)
    if not args.pathCaptureDS or args.only_classif_metric:
        return
    wanted = sorted(name for name in CAPTURE if getattr(args, name))
    refuse_if(
        not wanted and not args.captureSetStats,
        "--pathCaptureDS: nothing to capture; give --captureEverything, or one or more of "
        f"{', '.join('--' + name for name in sorted(CAPTURE - {'captureEverything'}))}, or "
        "--captureSetStats",
    )
    refuse_if(
        wanted and not args.pathCaptureSave,
        f"--{wanted[0] if wanted else ''} needs --pathCaptureSave DIR",
    )
    refuse_if(
        args.captureDSfreq is not None and args.captureDStotNr is not None,
        "--captureDSfreq and --captureDStotNr: choose one of them",
    )
    refuse_if(
        args.captureDSfreq is not None and args.captureDSfreq > 100,
        f"--captureDSfreq {args.captureDSfreq}: a percentage, from 1 to 100",
    )
    refuse_if(
        args.capturePhoneAlign and not args.path_phone_data,
        "--capturePhoneAlign needs --path_phone_data FILE",
    )
    for name in ("captureCPCCTCalign", "captureCPCCTClogScores"):
        refuse_if(getattr(args, name) and not args.CPCCTC, f"--{name} needs --CPCCTC")
    refuse_if(
        args.capturePred and (args.cpc_mode == "none" or args.supervised),
        "--capturePred: this run makes no predictions",
    )


def check_machine(args):
    refuse_if(args.threads > MOST_THREADS, f"--threads {args.threads}: at most {MOST_THREADS}")
    cuda = device_from(args.device).type == "cuda"
    refuse_if(
        args.precision != "fp32" and not cuda,
        f"--precision {args.precision} needs a CUDA device; use fp32",
    )
    if args.compile:
        check_compilers(cuda)
    refuse_if(args.nGPU == 0 or args.nGPU < -1, f"--nGPU {args.nGPU}: -1 (all) or a number from 1")
    n_gpus = torch.cuda.device_count() if cuda else args.nGPU
    refuse_if(args.nGPU > n_gpus, f"--nGPU {args.nGPU}: PyTorch sees {counted(n_gpus, 'GPU')} here")
    refuse_if(
        args.nGPU > 1 and args.only_classif_metric,
        f"--nGPU {args.nGPU}: probes of a checkpoint are trained in one process; leave it out",
    )


def check_compilers(cuda):
    """What PyTorch compiles with: Triton and a C compiler for a GPU, a C++ compiler for a CPU."""
    refuse_if(
        cuda and importlib.util.find_spec("triton") is None,
        "--compile on a GPU needs Triton, which isn't installed here; install it, or leave out "
        "--compile",
    )
    device, language, variable, usual = (
        ("GPU", "C", "CC", ["gcc", "clang"]) if cuda else ("CPU", "C++", "CXX", ["g++"])
    )
    tried = [os.environ[variable]] if variable in os.environ else usual
    refuse_if(
        not any(map(shutil.which, tried)),
        f"--compile on a {device} needs a {language} compiler, and there is no "
        f"{' or '.join(tried)} here; install one, name it in the environment variable {variable}, "
        "or leave out --compile",
    )


def check_paths(args, resumed):
    """The paths that this call of the program reads must exist, and it must be able to write."""
    refuse_if(
        not args.pathDB and args.restart,
        "--restart begins a new run, which needs --pathDB DIR and all its other flags again",
    )
    refuse_if(
        not args.pathDB and not resumed,
        f"--pathCheckpoint {args.pathCheckpoint}: no run there to go on with; a new one needs "
        "--pathDB DIR",
    )
    refuse_if(
        not args.pathDB, f"{args.pathCheckpoint} doesn't say where its audio is: give --pathDB DIR"
    )
    refuse_if(not os.path.isdir(args.pathDB), f"--pathDB {args.pathDB}: no such directory")
    used = {"path_phone_data"}
    if not args.onlyCapture:
        used |= {"pathTrain", "pathVal"}
    if not args.only_classif_metric:
        used |= {"pathCaptureDS"}
    for name in sorted(used):
        path = getattr(args, name)
        meant = labels_in(path) if name == "path_phone_data" else None
        hint = f"its phone labels are {meant}" if meant else "give a file"
        refuse_if(path and os.path.isdir(path), f"--{name} {path}: is a folder; {hint}")
        refuse_if(path and not os.path.isfile(path), f"--{name} {path}: no such file")
    written = set()
    if args.pathCaptureDS and not args.only_classif_metric:
        written |= {"pathCaptureSave"}
    if args.supervised_classif_metric and not args.onlyCapture:
        written |= {"linsep_logs_dir", "linsep_checkpoint_dir"}
    for name in sorted(written):
        path = getattr(args, name)
        if path:
            check_writable(path, f"--{name} {path}: results")


def labels_in(folder):
    """The phone labels in a folder of converted alignments; None where there are none."""
    labels = os.path.join(folder or "", "converted_aligned_phones.txt")
    return labels if os.path.isfile(labels) else None
