"""Linear separability: how well a small classifier tells phones or speakers from frozen features.

    python eval/linear_separability.py AUDIO TRAIN_LIST VAL_LIST CHECKPOINT.pt \
        --pathCheckpoint OUT/speakers                                            # speakers
    python eval/linear_separability.py AUDIO TRAIN_LIST VAL_LIST CHECKPOINT.pt \
        --pathCheckpoint OUT/phones --pathPhone LABELS [--CTC]                   # phones
    python eval/linear_separability.py AUDIO TRAIN_LIST VAL_LIST ONE.pt OTHER.pt ...
                                                 # on the features of both models, side by side

Each probe has a directory of its own; the same probe again replaces its results there.

What is left when speakers are taken out (Chorowski et al. 2021, arXiv:2106.11603): first
`--mode speakers_factorized`, then `--mode phonemes_nullspace` or `speakers_nullspace` with the
checkpoint that it wrote as `--path_speakers_factorized`.
"""

import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from dataset import AudioDataset
from eval.center_push import push_to_nearest, read_centers
from eval.probe import Probe, ProbeOptions
from feature_loader import load_model
from model import CPCModelNullspace
from utils.data.corpus import (
    read_utterance_list,
    scan_corpus,
    select_utterances,
    warn_of_single_speaker,
    warn_of_subsets,
)
from utils.data.labels import read_phone_labels
from utils.files import check_writable, load_json, load_tensors, save_json
from utils.misc import SAMPLES_PER_FRAME, UserError
from utils.run.checkpoint import open_checkpoint, save_checkpoint, saved_checkpoints
from utils.run.command import CommandLine, command
from utils.run.flags import stored_arguments
from utils.run.machine import device_from, keep_freed_memory

MODES = ("phonemes", "speakers", "speakers_factorized", "phonemes_nullspace", "speakers_nullspace")
DECISIVE = (  # flags that say what is measured; the others say how the classifier is trained
    "load", "no_pretraining", "unfrozen", "gru_level", "get_encoded", "mode", "pathPhone", "CTC",
    "pathVal",
)  # fmt: skip


@command
def main(argv=None):
    args = parse_arguments(argv)
    directory = Path(args.pathCheckpoint)
    check_directory(directory, args)
    keep_freed_memory()
    torch.manual_seed(args.random_seed)
    device = torch.device(args.device)
    model, architectures = build_model(args, open_checkpoints(args))
    train_set, validation_set, n_classes = build_sets(args)
    probe = Probe(
        "phone" if args.pathPhone else "speaker",
        model.to(device),
        train_set,
        validation_set,
        n_classes,
        options_of(args),
        device,
        transform=center_push(args, model, device),
    )
    for path in saved_checkpoints(directory):
        path.unlink()
    probe.run(partial(save_epoch, args, probe, architectures))
    save_json(directory / "checkpoint_logs.json", probe.logs)
    probe.draw_confusion(directory / "confusion.png")
    print(f"results: {directory}")


# ---------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """The arguments, checked and completed. Raises UserError with the flag and the cure."""
    args = build_parser().parse_args(argv)
    check_numbers(args)
    check_task(args)
    settle_device(args)
    check_writable(args.pathCheckpoint, f"--pathCheckpoint {args.pathCheckpoint}: results")
    args.load = [os.path.abspath(path) for path in args.load]
    args.pathVal = os.path.abspath(args.pathVal)
    args.pathPhone = args.pathPhone and os.path.abspath(args.pathPhone)
    if args.save_step <= 0:
        args.save_step = args.n_epoch
    return args


def refuse_first(rules):
    """Raise UserError with the first message whose condition holds."""
    for condition, message in rules:
        if condition:
            raise UserError(message)


def check_numbers(args):
    at_least_1 = ("n_epoch", "batchSizeGPU", "linsep_net_layers", "dim_inter", "n_process_loader")
    for name in (*at_least_1, "max_size_loaded"):
        value = getattr(args, name)
        refuse_first([(value < 1, f"--{name} {value}: must be at least 1")])
    for name in ("beta1", "beta2"):
        value = getattr(args, name)
        refuse_first([(not 0 <= value < 1, f"--{name} {value}: must be in [0, 1)")])
    if args.size_window is not None:
        check_window(args.size_window)
    refuse_first(
        [
            (not args.lr > 0, f"--lr {args.lr}: must be above 0"),
            (not args.epsilon > 0, f"--epsilon {args.epsilon}: must be above 0"),
        ]
    )


def check_window(n_samples):
    unusable = n_samples < 1 or n_samples % SAMPLES_PER_FRAME
    message = f"--size_window {n_samples}: must be a multiple of {SAMPLES_PER_FRAME}"
    refuse_first([(unusable, message)])


def check_task(args):
    nullspace = args.mode.endswith("_nullspace")
    refuse_first(
        [
            (
                args.model != "cpc" or args.path_fairseq,
                "--model and --path_fairseq: fairseq models can't be loaded here, only CPC "
                "checkpoints; leave both out",
            ),
            (args.CTC and not args.pathPhone, "--CTC needs --pathPhone FILE"),
            (
                args.CTC and args.get_encoded,
                "--get_encoded can't be used with --CTC: phones by CTC are read from the contexts",
            ),
            (
                args.mode.startswith("speakers") and args.pathPhone,
                f"--mode {args.mode} is about speakers, --pathPhone about phones: leave one out",
            ),
            (
                args.mode == "phonemes_nullspace" and not args.pathPhone,
                "--mode phonemes_nullspace needs --pathPhone FILE",
            ),
            (
                nullspace and not args.path_speakers_factorized,
                f"--mode {args.mode} needs --path_speakers_factorized FILE, a checkpoint that "
                "--mode speakers_factorized wrote",
            ),
            (
                args.path_speakers_factorized and not nullspace,
                "--path_speakers_factorized needs --mode phonemes_nullspace or speakers_nullspace",
            ),
            (
                args.mode == "speakers_factorized" and args.linsep_net_layers > 1,
                "--mode speakers_factorized has two layers: leave out --linsep_net_layers",
            ),
            (
                bool(args.centerpushFile) != (args.centerpushDeg is not None),
                "--centerpushFile and --centerpushDeg need each other",
            ),
        ]
    )


def settle_device(args):
    """Turn `auto` into what there is, and -1 into the number of GPUs."""
    args.device = device_from(args.device).type
    n_devices = torch.cuda.device_count() if args.device == "cuda" else 1
    refuse_first(
        [
            (args.nGPU == 0 or args.nGPU < -1, f"--nGPU {args.nGPU}: -1 (all) or a number from 1"),
            (
                args.nGPU > n_devices,
                f"--nGPU {args.nGPU}: more than the {n_devices} there are here",
            ),
        ]
    )
    if args.nGPU == -1:
        args.nGPU = n_devices


def build_parser():
    parser = CommandLine(
        prog="linear_separability.py",
        description="How well a small classifier tells phones (with --pathPhone) or speakers from "
        "the features of a model.",
    )
    add = parser.add_argument
    add("pathDB", help="root of the audio")
    add("pathTrain", help="list of the training sequences")
    add("pathVal", help="list of the validation sequences")
    add("load", nargs="+", help="checkpoint; the features of several are concatenated")
    add_task_flags(parser.add_argument_group("task"))
    add_training_flags(parser.add_argument_group("training"))
    add_data_flags(parser.add_argument_group("data and machine"))
    return parser


def add_task_flags(group):
    add = group.add_argument
    add("--pathPhone", metavar="FILE", help="phone labels, for the phone task (default: speakers)")
    add("--CTC", action="store_true", help="phones by CTC; reports phone error rate")
    add("--get_encoded", action="store_true", help="encoded frames instead of contexts")
    add(
        "--gru_level",
        type=int,
        default=-1,
        metavar="N",
        help="only the first N layers of the AR network (default: all)",
    )
    add(
        "--mode",
        choices=MODES,
        default="phonemes",
        help="phonemes, speakers: a plain classifier; speakers_factorized: through a "
        "bottleneck of --dim_inter; ..._nullspace: without the directions that such a bottleneck "
        "found (phones or speakers is decided by --pathPhone)",
    )
    add(
        "--path_speakers_factorized",
        metavar="FILE",
        help="checkpoint that a probe with --mode speakers_factorized wrote",
    )
    add(
        "--dim_inter",
        type=int,
        default=128,
        metavar="D",
        help="size of the bottleneck (default: 128)",
    )
    add(
        "--centerpushFile",
        metavar="FILE",
        help="centers (.npy, .txt, or .pt of a clustering) that features are moved to",
    )
    add("--centerpushDeg", type=float, metavar="SHARE", help="how far: 0 not at all, 1 all the way")
    add("--model", default="cpc", help="only cpc")
    add("--path_fairseq", metavar="DIR", help="not supported")


def add_training_flags(group):
    add = group.add_argument
    add(
        "--pathCheckpoint",
        default="out",
        metavar="DIR",
        help="where the results go, a directory for each probe (default: out)",
    )
    add("--n_epoch", type=int, default=10, metavar="N", help="epochs (default: 10)")
    add(
        "--save_step",
        type=int,
        default=-1,
        metavar="EPOCHS",
        help="epochs between checkpoints (default: one at the end)",
    )
    add("--batchSizeGPU", type=int, default=8, metavar="WINDOWS", help="windows in a batch")
    add("--linsep_net_layers", type=int, default=1, metavar="N", help="layers of the classifier")
    add("--lr", type=float, default=2e-4, help="learning rate")
    add("--beta1", type=float, default=0.9, help="Adam's beta 1")
    add("--beta2", type=float, default=0.999, help="Adam's beta 2")
    add("--epsilon", type=float, default=2e-8, help="Adam's epsilon")
    add("--unfrozen", action="store_true", help="train the model, too")
    add(
        "--no_pretraining",
        action="store_true",
        help="random weights: what an untrained model gives",
    )
    add("--random_seed", type=int, default=0, help="seed of everything random")


def add_data_flags(group):
    add = group.add_argument
    add(
        "--file_extension",
        default=".flac",
        metavar="EXT",
        help="end of the audio files' names (default: .flac)",
    )
    add(
        "--size_window",
        type=int,
        metavar="SAMPLES",
        help="a multiple of 160 (default: --sizeWindow of the run that the first checkpoint is of, "
        "20480 where it isn't known)",
    )
    add("--ignore_cache", action="store_true", help="list the audio files anew")
    add(
        "--max_size_loaded",
        type=int,
        default=4_000_000_000,
        metavar="SAMPLES",
        help="training audio held in memory at once, 2 bytes a sample (default: 4000000000)",
    )
    add(
        "--n_process_loader",
        type=int,
        default=8,
        metavar="N",
        help="threads that decode audio (default: 8)",
    )
    add("--debug", action="store_true", help="1000 training and 100 validation sequences only")
    add(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto: CUDA where there is one (default: auto)",
    )
    add(
        "--nGPU",
        type=int,
        default=-1,
        metavar="N",
        help="multiplies the batch (default: all GPUs); one device does the work",
    )


# ------------------------------------------------------------------------------ data and model


def build_sets(args):
    """Training set, validation set and the number of classes."""
    corpus = scan_corpus(
        args.pathDB,
        args.file_extension,
        ignore_cache=args.ignore_cache,
        n_threads=args.n_process_loader,
    )
    labels = read_phone_labels(args.pathPhone) if args.pathPhone else None
    if not labels:
        warn_of_single_speaker(corpus)
        warn_of_subsets(corpus)
    sets = []
    for title, path, n_debug in (
        ("training set", args.pathTrain, 1000),
        ("validation set", args.pathVal, 100),
    ):
        sequences = select_utterances(corpus.utterances, read_utterance_list(path), path)
        audio = AudioDataset(
            corpus,
            sequences[:n_debug] if args.debug else sequences,
            args.size_window,
            phone_labels=labels,
            labelled_only=labels is not None,
            max_size_loaded=args.max_size_loaded,
            n_threads=args.n_process_loader,
            title=title,
        )
        sets.append(audio)
    return *sets, labels.n_phones if labels else len(corpus.speakers)


def open_checkpoints(args):
    """The `Checkpoint`s to be probed. Says which, and takes the window from the first if no flag
    sets it."""
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
    """The model to be probed, in the null-space modes without the directions of speakers.

    Returns it and the architecture flags (dicts) of each single model in it.
    """
    model, *_ = load_model(
        checkpoints, gru_level=args.gru_level, load_weights=not args.no_pretraining
    )
    architectures = [vars(flags) for flags in model.arguments]
    if args.mode.endswith("_nullspace"):
        model = CPCModelNullspace(model, speaker_null_space(args.path_speakers_factorized))
    return model, architectures


def speaker_null_space(path):
    """Basis (D, D - dim_inter) of what the factorised speaker classifier in `path` doesn't see.

    Raises UserError if the file holds no such classifier, or it sees everything.
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
            f"leaves nothing of {weight.shape[1]}; train one with a smaller --dim_inter"
        )
    return basis


def null_space(matrix):
    """Orthonormal basis (n, k) of the vectors that `matrix` (m, n) maps to zero."""
    _, values, right = torch.linalg.svd(matrix, full_matrices=True)
    smallest = torch.finfo(matrix.dtype).eps * max(matrix.shape) * values.max()
    rank = int((values > smallest).sum())
    return right[rank:].T.contiguous()


def center_push(args, model, device):
    """The function that moves features as --centerpushFile says; None without."""
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
    )


def check_directory(directory, args):
    """Raise UserError if the directory holds results that these would not be a repetition of."""
    record = directory / "checkpoint_args.json"
    if not record.is_file() and not saved_checkpoints(directory):
        return
    before = load_json(record)
    if "dim_inter" not in before:
        raise UserError(
            f"--pathCheckpoint {directory}: holds the checkpoints of a training run; name another "
            "directory for the results"
        )
    differing = [name for name in DECISIVE if before.get(name) != getattr(args, name)]
    if differing:
        raise UserError(
            f"--pathCheckpoint {directory}: holds the results of a probe with another "
            f"{differing[0]} ({before.get(differing[0])}): name another directory, or remove this "
            "one"
        )


def save_epoch(args, probe, architectures, epoch):
    """Write a checkpoint, which `load_model` reads like that of a training run, when it is due."""
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
