"""Linear separability: phone or speaker accuracy of a small classifier on frozen features.

    python eval/linear_separability.py AUDIO TRAIN_LIST VAL_LIST CHECKPOINT.pt \\
        --pathCheckpoint OUT/speakers
    python eval/linear_separability.py AUDIO TRAIN_LIST VAL_LIST CHECKPOINT.pt \\
        --pathCheckpoint OUT/phones --pathPhone LABELS --knn 1,10

With --pathPhone, the classes are phones, otherwise speakers. Features of several checkpoints are
concatenated. Each probe needs its own directory; repeating a probe replaces its results there.

To probe features from which speaker information has been removed (Chorowski et al. 2021,
arXiv:2106.11603), run `--mode speakers_factorized` first, then `--mode phonemes_nullspace` or
`speakers_nullspace` with the checkpoint it wrote as `--path_speakers_factorized`.
"""

import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch

from dataset import build_sets
from eval.center_push import push_to_nearest, read_centers
from eval.probe import Probe
from eval.probe_options import ProbeOptions, further_options
from eval.units import check_width, cluster_features, read_frame_clusters
from feature_loader import load_model
from model import CPCModelNullspace
from utils.data.corpus import cut_for_debugging, open_corpus, split_utterances
from utils.data.labels import read_phone_labels
from utils.files import check_writable, load_json, load_tensors, save_json
from utils.misc import SAMPLES_PER_FRAME, UserError
from utils.run.checkpoint import open_checkpoint, save_checkpoint, saved_checkpoints
from utils.run.command import CommandLine, at_least, command
from utils.run.flags import stored_arguments
from utils.run.machine import device_from, prepare_device
from utils.run.shared_flags import (
    add_adam,
    add_device,
    add_extension,
    add_level,
    add_probe_flags,
    add_reading,
    check_probe_flags,
    check_same_flags,
)

MODES = ("phonemes", "speakers", "speakers_factorized", "phonemes_nullspace", "speakers_nullspace")
DECISIVE = (  # flags that define what is measured; the others define the training
    "load", "no_pretraining", "unfrozen", "gru_level", "get_encoded", "mode", "pathPhone", "CTC",
    "pathVal", "speaker_level", "feature_norm", "clusters", "level",
)  # fmt: skip


@command
def main(argv=None):
    args = parse_arguments(argv)
    clusters = open_clusters(args)
    directory = Path(args.pathCheckpoint)
    check_directory(directory, args)
    device = prepare_device(args.device)
    torch.manual_seed(args.random_seed)
    model, architectures = build_model(args, open_checkpoints(args))
    if clusters:
        check_width(clusters, model.dim_encoded if args.get_encoded else model.dim_context)
    train_set, validation_set, n_classes = open_sets(args)
    probe = Probe(
        "phone" if args.pathPhone else "speaker",
        model.to(device),
        train_set,
        validation_set,
        n_classes,
        options_of(args),
        device,
        transform=transform_of(args, clusters, model, device),
        n_features=len(clusters.centers) if clusters else None,
    )
    for path in saved_checkpoints(directory):
        path.unlink()
    probe.run(partial(save_epoch, args, probe, architectures))
    save_json(directory / "checkpoint_logs.json", probe.logs)
    probe.draw_confusion(directory / "confusion.png")
    print(f"results: {directory}")


# ---------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """The arguments, checked and completed. Raises UserError for those that can't work."""
    args = build_parser().parse_args(argv)
    if args.size_window is not None:
        check_window(args.size_window)
    check_task(args)
    check_mode(args)
    args.device, args.nGPU = find_device(args)
    check_writable(args.pathCheckpoint, f"--pathCheckpoint {args.pathCheckpoint}: results")
    args.load = [os.path.abspath(path) for path in args.load]
    args.clusters = args.clusters and os.path.abspath(args.clusters)
    args.pathVal = os.path.abspath(args.pathVal)
    args.pathPhone = args.pathPhone and os.path.abspath(args.pathPhone)
    if args.save_step <= 0:
        args.save_step = args.n_epoch
    return args


def check_window(n_samples):
    if n_samples < 1 or n_samples % SAMPLES_PER_FRAME:
        raise UserError(f"--size_window {n_samples}: must be a multiple of {SAMPLES_PER_FRAME}")


def check_task(args):
    if args.model != "cpc" or args.path_fairseq:
        raise UserError(
            "--model and --path_fairseq: only CPC checkpoints can be loaded, not fairseq models; "
            "leave both flags out"
        )
    if args.CTC and not args.pathPhone:
        raise UserError("--CTC needs --pathPhone FILE")
    if args.CTC and args.get_encoded:
        raise UserError("--get_encoded can't be used with --CTC, which reads phones from contexts")
    check_probe_flags(args, "--CTC" if args.CTC else None)
    normed = args.feature_norm != "none"
    if args.unfrozen and (normed or args.linsep_times > 1 or args.knn):
        raise UserError("--unfrozen: leave out --feature_norm, --linsep_times and --knn")
    if args.centerpushFile and normed:
        raise UserError("--centerpushFile: its centers are of features without --feature_norm")
    if args.clusters and (args.unfrozen or args.centerpushFile or normed or len(args.load) > 1):
        raise UserError(
            "--clusters probes the units of one checkpoint: name only one, and leave out "
            "--unfrozen, --centerpushFile and --feature_norm"
        )
    if bool(args.centerpushFile) != (args.centerpushDeg is not None):
        raise UserError("--centerpushFile and --centerpushDeg need each other")


def check_mode(args):
    nullspace = args.mode.endswith("_nullspace")
    if args.mode.startswith("speakers") and args.pathPhone:
        raise UserError(
            f"--mode {args.mode} is about speakers, --pathPhone about phones: leave one out"
        )
    if args.mode == "phonemes_nullspace" and not args.pathPhone:
        raise UserError("--mode phonemes_nullspace needs --pathPhone FILE")
    if nullspace and not args.path_speakers_factorized:
        raise UserError(
            f"--mode {args.mode} needs --path_speakers_factorized FILE, a checkpoint written with "
            "--mode speakers_factorized"
        )
    if nullspace and args.level == "segments":
        raise UserError(f"--level segments isn't supported with --mode {args.mode}")
    if args.path_speakers_factorized and not nullspace:
        raise UserError(
            "--path_speakers_factorized needs --mode phonemes_nullspace or speakers_nullspace"
        )
    for name, without in (("linsep_net_layers", 1), ("linsep_hidden", 0)):
        if args.mode == "speakers_factorized" and getattr(args, name) > without:
            raise UserError(f"--mode speakers_factorized always has two layers: leave out --{name}")


def find_device(args):
    """The type of the device, with `auto` resolved, and the number of GPUs, with -1 resolved."""
    device = device_from(args.device).type
    n_devices = torch.cuda.device_count() if device == "cuda" else 1
    if args.nGPU == 0 or args.nGPU < -1:
        raise UserError(f"--nGPU {args.nGPU}: must be -1 (all) or at least 1")
    if args.nGPU > n_devices:
        raise UserError(f"--nGPU {args.nGPU}: this machine has {n_devices}")
    return device, n_devices if args.nGPU == -1 else args.nGPU


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="linear_separability.py", description=__doc__)
    add = parser.add_argument
    add("pathDB", help="root of the audio")
    add("pathTrain", help="list of the training utterances")
    add("pathVal", help="list of the validation utterances")
    add("load", nargs="+", help="checkpoint; the features of several are concatenated")
    add_task_flags(parser.add_argument_group("task").add_argument)
    add_training_flags(parser.add_argument_group("training").add_argument)
    add_data_flags(parser.add_argument_group("data and machine").add_argument)
    return parser


def add_task_flags(add):
    add("--pathPhone", metavar="FILE", help="phone labels, for the phone task (default: speakers)")
    add("--CTC", action="store_true", help="phones by CTC; reports the phone error rate")
    add("--get_encoded", action="store_true", help="encoded frames instead of contexts")
    add_level(add)
    add("--gru_level", type=int, default=-1, metavar="N",
        help="only the first N layers of the AR network (default: all)")
    add("--mode", choices=MODES, default="phonemes",
        help="phonemes, speakers: a plain classifier; speakers_factorized: through a bottleneck of "
        "--dim_inter; ..._nullspace: features without the directions that such a bottleneck found "
        "(--pathPhone decides between phones and speakers)")
    add("--path_speakers_factorized", metavar="FILE",
        help="checkpoint of a probe with --mode speakers_factorized")
    add("--dim_inter", type=at_least(1), default=128, metavar="D", help="size of the bottleneck")
    add("--clusters", metavar="FILE",
        help="probe the discrete units of these clusters of eval/cluster.py, one-hot vectors")
    add("--centerpushFile", metavar="FILE",
        help="centers (.npy, .txt, or .pt of a clustering) to move the features towards")
    add("--centerpushDeg", type=float, metavar="FRACTION",
        help="how far to move them: 0 not at all, 1 all the way")
    add("--model", default="cpc", help="only cpc")
    add("--path_fairseq", metavar="DIR", help="not supported")


def add_training_flags(add):
    add("--pathCheckpoint", default="out", metavar="DIR",
        help="directory for the results, one for each probe")
    add("--n_epoch", type=at_least(1), default=10, metavar="N", help="epochs")
    add("--save_step", type=int, default=-1, metavar="EPOCHS",
        help="epochs between checkpoints (default: one at the end)")
    add("--batchSizeGPU", type=at_least(1), default=8, metavar="WINDOWS", help="windows per batch")
    add("--linsep_net_layers", type=at_least(1), default=1, metavar="N",
        help="layers of the classifier")
    add_probe_flags(add)
    add_adam(add, epsilon=2e-8)
    add("--unfrozen", action="store_true", help="train the model as well")
    add("--no_pretraining", action="store_true", help="random weights, for comparison")


def add_data_flags(add):
    add_extension(add)
    add("--speaker_level", type=at_least(1), default=1, metavar="N",
        help="number of folders below the root that name the speaker of a file")
    add("--size_window", type=int, metavar="SAMPLES",
        help="a multiple of 160 (default: --sizeWindow of the run of the first checkpoint, 20480 "
        "if unknown)")
    add("--max_size_loaded", type=at_least(1), default=4_000_000_000, metavar="SAMPLES",
        help="training audio held in memory at once, 2 bytes per sample (default: 4000000000)")
    add_reading(add)
    add_device(add)
    add("--nGPU", type=int, default=-1, metavar="N",
        help="multiplies the batch size (default: all GPUs); one device does the work")


# fmt: on


# ------------------------------------------------------------------------------ data and model


def open_sets(args):
    """Training set, validation set and the number of classes."""
    corpus = open_corpus(args, speakers_matter=not args.pathPhone)
    labels = read_phone_labels(args.pathPhone) if args.pathPhone else None
    sizes = {"size_window": args.size_window, "batch_size": args.batchSizeGPU}
    split = split_utterances(corpus, args.pathTrain, args.pathVal, **sizes)
    sets = build_sets(
        corpus,
        cut_for_debugging(split) if args.debug else split,
        args.size_window,
        labels=labels,
        max_sizes=(args.max_size_loaded,) * 2,
        n_threads=args.n_process_loader,
    )
    return *sets, labels.n_phones if labels else len(corpus.speakers)


def open_checkpoints(args):
    """The `Checkpoint`s to probe, which it prints.

    Without --size_window, the windows are those of the first one's run.
    """
    checkpoints = [open_checkpoint(path) for path in args.load]
    if args.size_window is None:
        first = checkpoints[0]
        stored = {name: v for name, v in first.state["args"].items() if name == "sizeWindow"}
        args.size_window = stored_arguments(stored, first.path).sizeWindow
        check_window(args.size_window)
    paths = ", ".join(str(checkpoint.path) for checkpoint in checkpoints)
    weights = ", with random weights" if args.no_pretraining else ""
    print(f"probing {paths}{weights}, in windows of {args.size_window} samples", flush=True)
    return checkpoints


def build_model(args, checkpoints):
    """The model to probe, projected to the null space of speakers in the null-space modes.

    Returns it and the architecture flags (dicts) of each model concatenated in it.
    """
    model, *_ = load_model(
        checkpoints,
        gru_level=args.gru_level,
        level=args.level,
        load_weights=not args.no_pretraining,
    )
    architectures = [vars(flags) for flags in model.arguments]
    if args.mode.endswith("_nullspace"):
        model = CPCModelNullspace(model, speaker_null_space(args.path_speakers_factorized))
    return model, architectures


def speaker_null_space(path):
    """Basis (D, D - dim_inter) of the features that the factorised classifier in `path` ignores.

    Raises UserError if the file holds no such classifier, or if it ignores nothing.
    """
    state = load_tensors(path)
    criterion = state.get("cpcCriterion") if isinstance(state, dict) else None
    weight = (criterion or {}).get("linearSpeakerClassifier.0.weight")
    if weight is None or "linearSpeakerClassifier.1.weight" not in criterion:
        raise UserError(
            f"--path_speakers_factorized {path}: isn't a checkpoint of --mode speakers_factorized"
        )
    basis = null_space(weight)
    if basis.shape[1] == 0:
        raise UserError(
            f"--path_speakers_factorized {path}: its bottleneck of {weight.shape[0]} dimensions "
            f"leaves none of {weight.shape[1]}; train one with a smaller --dim_inter"
        )
    return basis


def null_space(matrix):
    """Orthonormal basis (n, k) of the vectors that `matrix` (m, n) maps to zero."""
    _, values, right = torch.linalg.svd(matrix, full_matrices=True)
    smallest = torch.finfo(matrix.dtype).eps * max(matrix.shape) * values.max()
    rank = int((values > smallest).sum())
    return right[rank:].T.contiguous()


def open_clusters(args):
    """The `Clusters` of --clusters, which settle the layer of the features; None without it."""
    if not args.clusters:
        return None
    clusters = read_frame_clusters(
        args.clusters,
        args.load[0],
        get_encoded=args.get_encoded,
        level=args.level,
        gru_level=args.gru_level,
    )
    args.get_encoded = clusters.features["encoder_layer"]
    args.level = clusters.features["level"]
    args.gru_level = clusters.features["level_gru"] or -1
    return clusters


def transform_of(args, clusters, model, device):
    """The function that makes units of features or moves them to --centerpushFile, or None."""
    if clusters:
        return partial(cluster_features, clusters=clusters)
    if not args.centerpushFile:
        return None
    centers = read_centers(args.centerpushFile).to(device)
    n_features = model.dim_encoded if args.get_encoded else model.dim_context
    if centers.shape[1] != n_features:
        raise UserError(
            f"--centerpushFile {args.centerpushFile}: centers of {centers.shape[1]} dimensions "
            f"for features of {n_features}"
        )
    return partial(push_to_nearest, centers=centers, degree=args.centerpushDeg)


# --------------------------------------------------------------------------------- the results


def options_of(args):
    return ProbeOptions(
        n_epochs=args.n_epoch,
        batch_size=args.batchSizeGPU * args.nGPU,
        learning_rate=args.lr,
        beta1=args.beta1,
        beta2=args.beta2,
        epsilon=args.epsilon,
        n_layers=args.linsep_net_layers,
        ctc=args.CTC,
        get_encoded=args.get_encoded,
        n_inner=args.dim_inter if args.mode == "speakers_factorized" else 0,
        unfrozen=args.unfrozen,
        logging_step=args.save_step,
        seed=args.random_seed,
        **further_options(args),
    )


def check_directory(directory, args):
    """Raise UserError unless the directory is free or holds results of the same probe."""
    record = directory / "checkpoint_args.json"
    if not record.is_file() and not saved_checkpoints(directory):
        return
    older = {"speaker_level": 1, "feature_norm": "none", "clusters": None, "level": "frames"}
    stored = older | load_json(record)
    if "dim_inter" not in stored:
        raise UserError(
            f"--pathCheckpoint {directory}: holds the checkpoints of a training run; name another "
            "directory for the results"
        )
    check_same_flags(
        f"--pathCheckpoint {directory}", stored, args, DECISIVE, "the results of a probe"
    )


def save_epoch(args, probe, architectures, epoch):
    """Write a checkpoint if one is due; `load_model` reads it like that of a training run."""
    last = epoch == args.n_epoch - 1
    if not last and (epoch == 0 or epoch % args.save_step):
        return
    state = {
        "gEncoder": probe.model.state_dict(),
        "cpcCriterion": probe.criterion.state_dict(),
        "optimizer": probe.optimizer.state_dict(),
        "best": probe.best.model,
        "args": vars(args),
        "logs": probe.logs,
        "position": [epoch + 1, 0, 0],
        "models": architectures,
    }
    save_checkpoint(args.pathCheckpoint, state, epoch)


if __name__ == "__main__":
    main()
