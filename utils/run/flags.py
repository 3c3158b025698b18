"""The command line of train.py: every flag, declared once. The rules between flags are in rules.py.

Names and defaults are those of the original program.
"""

import argparse
import os
from functools import partial

from utils.misc import UserError, first_few
from utils.run.command import (
    AUDIO_EXTENSION,
    CommandLine,
    above,
    at_least,
    band,
    between,
    decay_rate,
    each_at_least,
    extension,
)
from utils.run.level_flags import HEADING, add_refused, declare_levels
from utils.run.shared_flags import LEVEL, add_probe_flags

# What happens to a flag when a run is resumed. Each flag is in exactly one of these sets:
ARCHITECTURE = set()  # describe the networks: always the checkpoint's value
DATA_ORDER = set()  # decide the order of the data: the checkpoint's value when a run is resumed
THIS_CALL = set()  # concern only this call of the program: never the checkpoint's value
INHERITED = set()  # all others: the command line's value if given, else the checkpoint's

MODEL = set()  # the part of ARCHITECTURE that describes encoder and AR network
CONTRASTIVE_ONLY = set()  # no effect with --supervised or --cpc_mode none
CPCCTC_ONLY = set()  # no effect without --CPCCTC
SUPERVISED_ONLY = set()  # no effect without --supervised
PROBE_GROUP = set()  # everything about probes during training
CAPTURE_GROUP = set()  # everything about captures and their stats
EFFECT_OF = {}  # flag -> effect that it is a parameter of
CAPTURED_BY = {}  # flag -> name of the tensor that it captures (utils/capture.py)
FILES = set()  # those that name files
PATHS = set()  # those that name files or directories
LISTS = set()  # those that take several values
AUGMENTATION = set()  # no effect without --augment_type
DECLARED = {}  # heading in --help -> (flag, options of argparse) of each flag under it


def declare(heading, flag, *, on_resume, also=None, captures=None, effect=None, **options):
    """Declare a flag of train.py and put it into the sets that it belongs to.

    heading: in --help; on_resume, also: sets above; captures, effect: their names; options: those
    of argparse. A flag with the metavar FILE or DIR is one of PATHS.
    """
    name = flag.removeprefix("--")
    on_resume.add(name)
    if also is not None:
        also.add(name)
    if captures:
        CAPTURED_BY[name] = captures
    if effect:
        EFFECT_OF[name] = effect
    if options.get("metavar") == "FILE":
        FILES.add(name)
    if options.get("metavar") in ("FILE", "DIR"):
        PATHS.add(name)
    if options.get("nargs") in ("+", "*"):
        LISTS.add(name)
    DECLARED.setdefault(heading, []).append((name, options))


# A flag on two lines reads better than on seven, hence:
# fmt: off
# ------------------------------------------------------------------------------------------ data

add = partial(declare, "data")
add("--pathDB", on_resume=INHERITED, metavar="DIR",
    help="root of the audio: speaker/.../utterance + extension")
add("--file_extension", type=extension, default=str(AUDIO_EXTENSION), on_resume=INHERITED,
    metavar="EXT", help="file name extension of the audio (default: the one found below --pathDB; "
    ".flac if there are several)")
add("--speaker_level", type=at_least(1), default=1, on_resume=ARCHITECTURE, metavar="N",
    help="number of folders below --pathDB that name the speaker of a file; 2 for TIMIT")
add("--pathTrain", on_resume=DATA_ORDER, metavar="FILE", help="training list: one utterance per "
    "line, its file name without extension, or speaker/name if other files have "
    "the same name (default: all utterances)")
add("--pathVal", on_resume=DATA_ORDER, metavar="FILE",
    help="validation list (default: 1 %% of the training utterances are held out)")
add("--path_phone_data", on_resume=INHERITED, metavar="FILE", help="phone labels: one utterance "
    "per line, `name label label ...`, one label per 10 ms; for phone probes, phone capture and "
    "supervised training")
add("--sizeWindow", type=at_least(1), default=20480, on_resume=ARCHITECTURE, also=MODEL,
    metavar="SAMPLES", help="length of a training window, a multiple of 160")
add("--samplingType", choices=("samespeaker", "uniform", "samesequence", "sequential"),
    default="samespeaker", on_resume=DATA_ORDER, help="where the windows of a batch come from; "
    "with `sequential` the AR network keeps its hidden state from one batch to the next")
add("--max_size_loaded", type=at_least(1), default=4_000_000_000, on_resume=DATA_ORDER,
    metavar="SAMPLES", help="training audio held in memory at once, 2 bytes per sample; lower it "
    "if memory is short: a larger corpus is read in packs, the next one in the background")
add("--max_bad_files", type=between(0, 1, float), default=0.01, on_resume=INHERITED,
    metavar="FRACTION", help="stop if more than this fraction of the files is undecodable; small "
    "sets tolerate up to a quarter (1 to 3 files); 0 tolerates none")
add("--ignore_cache", action="store_true", on_resume=THIS_CALL,
    help="list the audio files again; needed after files were added or removed")
add("--debug", action="store_true", on_resume=THIS_CALL,
    help="use only the last 1000 training and the last 100 validation utterances")

# ---------------------------------------------------------------------------------- augmentation

AUGMENT_TYPES = {  # value of --augment_type -> effects that it chains (augmentation.py)
    "none": (), "pitch": ("pitch",), "pitch_quick": ("pitch",), "additive": ("additive",),
    "pitch_dropout": ("pitch", "time_dropout"), "time_dropout": ("time_dropout",),
    "reverb": ("reverb",), "reverb_dropout": ("reverb", "time_dropout"),
    "artificial_reverb": ("reverb",), "artificial_reverb_dropout": ("reverb", "time_dropout"),
    "natural_reverb": ("natural_reverb",), "bandreject": ("bandreject",),
}
add = partial(declare, "augmentation", on_resume=DATA_ORDER, also=AUGMENTATION)
add("--augment_type", nargs="*", choices=tuple(AUGMENT_TYPES), also=None, help="augment training "
    "windows with these effects, in this order (Kharitonov et al., SLT 2021)")
add("--augment_past", action="store_true", help="augment the copy that contexts come from")
add("--augment_future", action="store_true",
    help="augment the copy that frames to predict and negatives come from")
add("--past_equal_future", action="store_true", help="one augmented copy for both")
add("--augment_combine", choices=("chain", "choice"), default="chain",
    help="all effects in turn, or a random one of them for each window")
add("--augment_prob", type=between(0.01, 1, float), default=1.0, metavar="FRACTION",
    help="augment this fraction of the windows of each batch")
add("--shift_max", type=between(0, 1200), default=300, effect="pitch", metavar="CENTS",
    help="pitch: at most CENTS up or down")
add("--room_scale_max", type=between(0, 100), default=100, effect="reverb", metavar="SIZE",
    help="reverb: rooms of size 0 to SIZE, as in SoX")
add("--min_snr_in_db", type=between(-100, 100, float), default=5.0, effect="additive", metavar="DB",
    help="additive: lowest signal-to-noise ratio")
add("--max_snr_in_db", type=between(-100, 100, float), default=20.0, effect="additive",
    metavar="DB", help="additive: highest signal-to-noise ratio")
add("--additive_noise_snr", type=between(-100, 100, float), effect="additive", metavar="DB",
    help="additive: always this signal-to-noise ratio")
add("--noise_band", type=band, effect="additive", metavar="LOW-HIGH",
    help="additive: only noise between these frequencies in Hz, such as 80-240")
add("--pathDBNoise", effect="additive", metavar="DIR", help="additive: recordings of noise "
    "(default: babble of other speakers; coloured noise where there is only one)")
add("--pathSeqNoise", effect="additive", metavar="FILE",
    help="additive: list of these recordings (default: all)")
add("--noise_extension", type=extension, metavar="EXT", help="file name extension of noise and "
    "impulse responses (default: the one found in the folder; .wav if there are several)")
add("--pathImpulseResponses", effect="natural_reverb", metavar="DIR",
    help="natural_reverb: recorded impulse responses")
add("--t_ms", type=at_least(0), default=100, effect="time_dropout", metavar="MS",
    help="types with dropout: silence of at most MS milliseconds")
add("--bandreject_scaler", type=at_least(0, float), default=1.0, effect="bandreject",
    metavar="FACTOR", help="bandreject: at most FACTOR times 300 mel")

# ----------------------------------------------------------------------------------- checkpoints

add = partial(declare, "checkpoints and what to do with them")
add("--pathCheckpoint", on_resume=THIS_CALL, metavar="DIR", help="where checkpoints, logs and "
    "pictures go; a run found there is resumed and needs no other flag. With --onlyCapture or "
    "--only_classif_metric, a single .pt file works too")
add("--restart", action="store_true", on_resume=THIS_CALL, help="train from scratch even if there "
    "is a checkpoint; the old ones stay until the first new one is written")
add("--load", nargs="+", on_resume=THIS_CALL, metavar="FILE", help="start from the weights of "
    "these checkpoints; the features of several are concatenated. A directory stands for its "
    "newest checkpoint")
add("--loadCriterion", action="store_true", on_resume=THIS_CALL,
    help="load the criterion's weights, too (needs --load with one checkpoint)")
add("--loadOnlyFrameModel", action="store_true", on_resume=THIS_CALL,
    help="load only the frame level; with --multiLevel, a new level of segments comes on top")
add("--gru_level", type=int, default=-1, on_resume=THIS_CALL, metavar="N",
    help="keep only the first N layers of the loaded AR network; needs --load (default: all)")
add("--nullspace", action="store_true", on_resume=THIS_CALL,
    help="load a null-space model, and refuse any other (needs --load)")
add("--save_step", type=at_least(1), default=5, on_resume=INHERITED, metavar="EPOCHS",
    help="epochs between checkpoints")
add("--keep", type=at_least(0), default=0, on_resume=INHERITED, metavar="N",
    help="keep only the last N checkpoint_<epoch>.pt and the best epoch's; each new one removes "
    "older ones (0: keep all)")
add("--resume_every", type=at_least(0), on_resume=THIS_CALL, metavar="STEPS",
    help="training steps between saves of checkpoint_resume.pt, from which a killed run resumes "
    "inside an epoch (0: only on a stop signal; default: every 10 minutes, or every 100 times as "
    "long as a save takes)")
add("--logging_step", type=at_least(1), default=1000, on_resume=INHERITED, metavar="STEPS",
    help="training steps between printed running means")
add("--tensorboard", nargs="?", const=True, on_resume=INHERITED, metavar="DIR",
    help="write curves, pictures and flags for TensorBoard to DIR, a new one for each run "
    "(default: the folder tensorboard in --pathCheckpoint)")
add("--onlyCapture", action="store_true", on_resume=THIS_CALL, help="no training: capture once "
    "with the model of --pathCheckpoint (needs --pathCaptureDS)")
add("--only_classif_metric", action="store_true", on_resume=THIS_CALL,
    help="no training: run the probes once on the model of --pathCheckpoint")

# ---------------------------------------------------------------------------------- optimisation

add = partial(declare, "optimisation", on_resume=INHERITED)
add("--nEpoch", type=at_least(0), default=200, metavar="N",
    help="epochs in all, including those before a run was resumed")
add("--batchSizeGPU", type=at_least(1), default=8, on_resume=DATA_ORDER, metavar="WINDOWS",
    help="windows per batch of each process")
add("--learningRate", type=at_least(0, float), default=2e-4, metavar="RATE",
    help="Adam's learning rate")
add("--beta1", type=decay_rate, default=0.9, metavar="B", help="Adam's beta 1")
add("--beta2", type=decay_rate, default=0.999, metavar="B", help="Adam's beta 2")
add("--epsilon", type=at_least(0, float), default=1e-8, metavar="EPS", help="Adam's epsilon")
add("--schedulerStep", type=int, default=-1, metavar="EPOCHS",
    help="halve the learning rate every EPOCHS epochs (default: never)")
add("--schedulerRamp", type=at_least(1), metavar="EPOCHS",
    help="raise the learning rate linearly over the first EPOCHS epochs; helps a deep model start")
add("--clip_grad_norm", type=above(0), metavar="NORM", help="clip the norm of the gradient, over "
    "all weights, to this; helps if the loss jumps (default: no clipping)")
add("--random_seed", type=between(0, 2**63 - 1), on_resume=DATA_ORDER, metavar="SEED",
    help="seed of everything random (default: drawn, and stored in the checkpoint)")

# ----------------------------------------------------------------------------------------- model

add = partial(declare, "model", on_resume=ARCHITECTURE, also=MODEL)
add("--encoder_type", choices=("cpc", "mfcc", "lfb"), default="cpc",
    help="waveform -> frames: five convolutions, MFCCs, or learnable filter banks")
add("--hiddenEncoder", type=at_least(2), default=256, metavar="E",  # a norm over 1 channel gives 0
    help="channels of the encoder")
add("--normMode", choices=("instanceNorm", "ID", "layerNorm", "batchNorm"), default="layerNorm",
    help="normalisation inside the convolutional encoder (ID: none)")
add("--initialisation", choices=("lecun", "original"), default="lecun",
    help="initial weights of the convolutions; with the original's, plain CPC often never starts "
    "to learn, since quiet speech drowns in the biases")
add("--linearOutput", action="store_true",
    help="no ReLU after the encoder's last norm (Kreuk et al., Interspeech 2020)")
add("--arMode", choices=("GRU", "LSTM", "RNN", "no_ar", "transformer"), default="LSTM",
    help="autoregressive (AR) network, encoded frames -> contexts")
add("--hiddenGar", type=at_least(1), default=256, metavar="C",
    help="channels of the AR network (no_ar and transformer: those of the encoder)")
add("--nLevelsGRU", type=at_least(1), default=1, metavar="N",
    help="layers of a recurrent AR network")
add("--abspos", action="store_true",
    help="absolute instead of relative positions (needs --arMode transformer)")

# ------------------------------------------------------------------------------------- criterion

add = partial(declare, "criterion", on_resume=ARCHITECTURE)
add("--cpc_mode", choices=("reverse", "none"), also=MODEL,
    help="reverse: predict the past from the future; none: no loss, nothing is learned")
add("--nPredicts", type=at_least(1), default=12, metavar="K",
    help="predictions made from each frame")
add("--negativeSamplingExt", type=at_least(1), default=128, metavar="N",
    help="negatives drawn for each frame")
add("--limitNegsInBatch", type=at_least(0), default=0, also=CONTRASTIVE_ONLY, metavar="ROWS",
    help="draw negatives only within groups of ROWS windows of the batch; harder, and the model "
    "learns less about speakers and more about phones (0: from the whole batch)")
HEADS = ("transformer", "RNN", "LSTM", "linear", "ffd", "conv4", "conv8", "conv12", "none")
add("--rnnMode", default="transformer", choices=HEADS,
    help="prediction heads, one per prediction; linear is by far the fastest; with none, the "
    "context itself is the only prediction")
add("--multihead_rnn", action="store_true", also=CONTRASTIVE_ONLY, help="one transformer head with "
    "an output per prediction, as in CPC2; faster than one transformer per prediction")
add("--normalizeCPCScore", action="store_true", also=CONTRASTIVE_ONLY, help="score by cosine "
    "similarity instead of dot product (Kreuk et al., Interspeech 2020; Cuervo et al. 2021)")
add("--scoreTemperature", type=above(0), default=1.0, also=CONTRASTIVE_ONLY, metavar="T",
    help="divide scores by this; below 1, cosine scores separate frames more sharply")
add("--dropout", action="store_true", also=CONTRASTIVE_ONLY,
    help="dropout of 0.5 on the predictions")
add("--speakerEmbedding", type=at_least(0), default=0, also=CONTRASTIVE_ONLY, metavar="D",
    help="size of a learned speaker embedding given to the heads (0: none)")

# --------------------------------------------------------------------------------------- CPC-CTC

add = partial(declare, "CPC-CTC", on_resume=ARCHITECTURE, also=CPCCTC_ONLY)
add("--CPCCTC", action="store_true", also=CONTRASTIVE_ONLY, help="align the K predictions to the "
    "next M frames instead of tying prediction k to frame k (Chorowski et al., Interspeech 2021)")
add("--CPCCTCNumMatched", type=at_least(1), default=16, metavar="M",
    help="frames that the predictions are aligned to; at least the number of predictions")
add("--CPCCTCSkipBeg", type=at_least(0), default=0, metavar="N",
    help="number of leading predictions that may stay unaligned")
add("--CPCCTCSkipEnd", type=at_least(0), default=0, metavar="N",
    help="number of trailing predictions that may stay unaligned")
add("--CPCCTCSelfLoop", action="store_true",
    help="the present frame is one more prediction, before the first")
add("--CPCCTCLearnBlank", action="store_true",
    help="a learned blank that any frame may be aligned to")
add("--CPCCTCNoNegsMatchWin", action="store_true",
    help="draw no negatives from the matched frames (except the last of them)")
add("--CPCCTCMasq", default="", metavar="RULES", help="pairs that can't be aligned, as "
    "a:b:c:d,...: matched frames a to b - 1 with predictions c to d - 1, counted from 0 (`none`: "
    "no bound). So 0:4:6:none leaves the first four frames to the first six predictions")
add("--CPCCTCLossTemp", type=above(0), default=1.0, metavar="T",
    help="temperature of the alignment; above 1 it is softer")
add("--CPCCTCNormalizeEncs", action="store_true", help="normalise the encoded frames")
add("--CPCCTCNormalizePreds", action="store_true", help="normalise the predictions")

# ------------------------------------------------------------------------------------ two levels

declare_levels(declare, ARCHITECTURE, INHERITED, MODEL, CPCCTC_ONLY, HEADS)
TWO_LEVELS = {name for name, _ in DECLARED[HEADING]}  # no effect without --multiLevel

# ------------------------------------------------------------------------------------ supervised

add = partial(declare, "supervised training", on_resume=ARCHITECTURE, also=SUPERVISED_ONLY)
add("--supervised", action="store_true", also=None, help="train the whole network to classify "
    "phones (with --path_phone_data) or speakers (without), instead of CPC")
add("--CTC", action="store_true", help="train the phone classifier with CTC: on the sequence of "
    "phones, not on their frames")
add("--nLevelsPhone", type=at_least(1), default=1, metavar="N",
    help="layers of the phone classifier")
add("--onEncoder", action="store_true", help="classify encoded frames instead of contexts")

# ---------------------------------------------------------------------------------------- probes

add = partial(declare, "linear separability (probes)", on_resume=INHERITED, also=PROBE_GROUP)
add("--supervised_classif_metric", action="store_true",
    help="train probes on the frozen features during training")
add("--speaker_sep", action="store_true", help="probe for speakers")
add("--CTCphones", action="store_true", help="phone probe with CTC; reports phone error rate")
add("--phone_get_encoded", action="store_true",
    help="phone probe on encoded frames instead of contexts")
add("--linsep_classif_each_epochs", type=each_at_least(1), default=20, metavar="N",
    help="probe at epochs N, 2N, ... (counted from 0; never at epoch 0), or at those of a list, "
    "such as 10,50,199")
add("--linsep_n_epoch", type=at_least(1), default=10, metavar="N", help="epochs of a probe")
add("--linsepBatchSizeGPU", type=at_least(1), default=8, metavar="WINDOWS",
    help="windows per batch of a probe")
add("--linsep_net_layers", type=at_least(1), default=1, metavar="N", help="layers of a probe")
add_probe_flags(add)
add("--linsep_lr", type=at_least(0, float), default=2e-4, metavar="RATE",
    help="learning rate of a probe")
add("--linsep_beta1", type=decay_rate, default=0.9, metavar="B", help="Adam's beta 1 in a probe")
add("--linsep_beta2", type=decay_rate, default=0.999, metavar="B", help="Adam's beta 2 in a probe")
add("--linsep_epsilon", type=at_least(0, float), default=2e-8, metavar="EPS",
    help="Adam's epsilon in a probe")
add("--linsep_logs_dir", metavar="DIR", help="where the probes' logs go")
add("--linsep_checkpoint_dir", metavar="DIR",
    help="where the best classifiers go (default: they aren't saved)")
add("--linsep_task_logging_step", type=at_least(1), default=1, metavar="EPOCHS",
    help="a probe's epochs between writes of its log")
add = partial(declare, "linear separability (probes)", on_resume=INHERITED)
add("--unit_quality_each_epochs", type=at_least(1), metavar="N",
    help="cluster contexts of the validation set at epochs N, 2N, ... and log how well these units "
    "match phones and speakers (eval/unit_quality.py)")
add("--nClusters", type=at_least(2), default=50, metavar="K", help="number of these units")
add("--level", **LEVEL)

# --------------------------------------------------------------------------------------- capture

add = partial(declare, "capture and stats", on_resume=INHERITED, also=CAPTURE_GROUP)
add("--pathCaptureDS", metavar="FILE", help="list of the utterances to capture")
add("--captureDSfreq", type=between(1, 100), metavar="PERCENT",
    help="capture this percentage of that list, spread evenly over it")
add("--captureDStotNr", type=at_least(1), metavar="N",
    help="capture N utterances of that list, spread evenly over it")
add("--pathCaptureSave", metavar="DIR",
    help="captures go to DIR/<epoch>/<what>/ (not needed for stats alone)")
add("--captureEachEpochs", type=at_least(1), default=10, metavar="N",
    help="capture at epochs 0, N, 2N, ...")
add("--captureEverything", action="store_true", help="all of the following that apply")
add("--captureConvRepr", captures="conv_repr", action="store_true", help="encoded frames (B, S, E)")
add("--captureCtxRepr", captures="ctx_repr", action="store_true", help="contexts (B, S, C)")
add("--captureSegBoundaries", captures="seg_boundaries", action="store_true",
    help="first frames of segments (B, S) (needs --multiLevel)")
add("--captureSegConv", captures="seg_conv", action="store_true",
    help="encoded segments, repeated over their frames (B, S, E) (needs --multiLevel)")
add("--captureSegCtx", captures="seg_ctx", action="store_true",
    help="contexts of segments, likewise (B, S, C) (needs --multiLevel)")
add("--captureSpeakerAlign", captures="speaker_align", action="store_true", help="speaker ids (B,)")
add("--capturePhoneAlign", captures="phone_align", action="store_true",
    help="phone labels (B, S) (needs --path_phone_data)")
add("--capturePred", captures="pred", action="store_true", help="predictions (B, W, E, P)")
add("--captureCPCCTCalign", captures="cpcctc_align", action="store_true",
    help="alignments (B, W, M) (needs --CPCCTC)")
add("--captureCPCCTClogScores", captures="cpcctc_log_scores", action="store_true",
    help="log scores of frames and predictions (B, W, M, P) (needs --CPCCTC)")
add("--captureSetStats", metavar="SPEC", help="statistics over the captured set: "
    "reprDiff:METRIC,REPR,STEP,DIRECTORY, boundaries:METRIC,REPR,[lenient],DIRECTORY, "
    "alignOccupancy:DIRECTORY or phoneSim:REPR,DIRECTORY, or several joined by `_`. REPR is "
    "conv_repr, ctx_repr, seg_conv or seg_ctx, METRIC such as cosine; pictures go to DIRECTORY")

# --------------------------------------------------------------------------------------- machine

add = partial(declare, "machine", on_resume=THIS_CALL)
add("--device", choices=("auto", "cpu", "cuda"), default="auto",
    help="auto: CUDA if available")
add("--nGPU", type=int, default=-1, metavar="N", help="processes on this machine, each with its "
    "own batches and its own GPU or share of the CPU (default: one per GPU). Under torchrun "
    "and srun: as many as these started")
add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
    help="precision of matrix multiplications; tf32 and bf16 need CUDA. With bf16, recurrent "
    "networks use tf32")
add("--compile", action="store_true", help="compile encoder and criterion and, on a single GPU, "
    "record a step's kernels and replay them (slower start)")
add("--threads", type=between(0, 1024), default=0, metavar="N",  # the C library aborts at far more
    help="CPU threads of each process for computing (default: as in the checkpoint if there are "
    "enough processors; else one per processor, divided among the processes of a machine; on CUDA "
    "at most 4)")
add("--n_process_loader", type=at_least(1), default=8, metavar="N",
    help="threads that decode audio, at most one per processor")

# fmt: on
# ------------------------------------------------------------------------------- the command line

COMMANDS = """\
commands:
  # train; here CPC-CTC
  python train.py --pathDB DIR --pathTrain LIST --pathVal LIST --pathCheckpoint RUN --CPCCTC

  # resume
  python train.py --pathCheckpoint RUN

  # capture with the model of a checkpoint
  python train.py --onlyCapture --pathCheckpoint RUN --pathCaptureDS LIST \\
      --pathCaptureSave DIR --captureEverything

  # probe the model of a checkpoint
  python train.py --only_classif_metric --pathCheckpoint RUN --speaker_sep \\
      --path_phone_data LABELS --linsep_logs_dir DIR
"""


def build_parser():
    """The parser of train.py, with every flag and its default."""
    parser = CommandLine(
        prog="train.py",
        usage="train.py --pathDB DIR --pathCheckpoint RUN [flags]",
        description="Train Contrastive Predictive Coding (CPC) or its aligned variant CPC-CTC on "
        "speech; probe and capture what it learned. README.md shows how. A resumed run keeps its "
        "flags; --no-FLAG turns off a switch that was on.",
        epilog=COMMANDS,
    )
    add_refused(parser.add_argument)
    for heading, flags in DECLARED.items():
        group = parser.add_argument_group(heading)
        for name, options in flags:
            group.add_argument(f"--{name}", **options)
            if options.get("action") == "store_true" or "const" in options:
                off = {"action": "store_false", "default": False, "help": argparse.SUPPRESS}
                group.add_argument(f"--no-{name}", dest=name, **off)
    return parser


def parse_arguments(argv):
    """Parse the command line only. Returns the arguments and the set of flags given explicitly.

    Relative paths are made absolute, so that a run can be resumed from any directory.
    """
    parser, not_given = build_parser(), object()
    args = parser.parse_args(argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args), not_given))
    given = vars(parser.parse_args(argv, blank))
    for name in sorted(PATHS):
        path = getattr(args, name)
        if isinstance(path, list):
            setattr(args, name, [absolute(part, f"--{name}") for part in path])
        elif isinstance(path, str):
            setattr(args, name, absolute(path, f"--{name}"))
    explicit = {name for name, value in given.items() if value is not not_given}
    if "file_extension" not in explicit:
        args.file_extension = AUDIO_EXTENSION  # until the corpus is opened
    return args, explicit


def flags_of_levels(args):
    """The flags that describe the levels of a model, a dict."""
    return {name: getattr(args, name) for name in sorted(TWO_LEVELS & MODEL)}


def absolute(path, flag):
    """The absolute path. Raises UserError if it is empty, as from an unset variable."""
    if not path:
        raise UserError(f"{flag}: an empty path; is a shell variable unset?")
    return os.path.abspath(path)


def stored_arguments(stored, source):
    """The arguments in a checkpoint (a dict) as a namespace, completed by defaults.

    They are parsed like a command line, so a damaged value is refused, by name and `source`, like a
    mistyped one. Unknown ones, such as those of a newer version, are left out.
    """
    # Runs of the original, and of this program before it had the flag:
    stored = {"initialisation": "original"} | stored
    argv = []
    for name in sorted((ARCHITECTURE | DATA_ORDER | INHERITED) & stored.keys()):
        value = stored[name]
        if isinstance(value, list) and len(value) == 1 and name not in LISTS:
            value = value[0]  # as hCPC stores --file_extension
        if value is True:
            argv.append(f"--{name}")
        elif isinstance(value, list) and name in LISTS:
            argv += [f"--{name}", *map(str, value)]
        elif isinstance(value, list):
            several = first_few(map(str, value))
            raise UserError(f"{source}: --{name} has several values, {several}: give it one value")
        elif value is not None and value is not False:
            argv.append(f"--{name}={value}")
    try:
        return build_parser().parse_args(argv)
    except UserError as error:
        raise UserError(f"{source}: its stored arguments can't be used: {error}") from error
