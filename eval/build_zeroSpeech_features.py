"""Features of all audio files in a folder, a file for each, as for the Zero Speech challenge.

    python eval/build_zeroSpeech_features.py AUDIO OUT CHECKPOINT.pt --format npz --strict
    python eval/build_zeroSpeech_features.py AUDIO OUT CHECKPOINT.pt --format pt --extension .flac
    python eval/build_zeroSpeech_features.py AUDIO OUT CLASSIFIER.pt --addCriterion [--oneHot]

`OUT/<name>.<format>` holds the features of `<name><extension>`, T frames of 10 ms with D values:

    npz   `features` (T, D) float32, `time` (T,) the middle of each frame and `totTime` (1,) the
          length of the file, both in seconds
    npy   the features alone
    pt    the same as a PyTorch tensor, which `eval/ABX.py from_pre_computed` reads
    fea   text, a line for each frame: time and values, separated by blanks

`OUT.json`, beside the folder, keeps the flags. A call that was stopped goes on where it was when it
is repeated.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from eval.center_push import read_centers, squared_distances
from feature_loader import (
    FeatureModule,
    ModelPhoneCombined,
    build_feature,
    load_model,
    load_phone_classifier,
)
from utils.data.listing import find_files
from utils.files import atomic_path, load_json, remove_leftovers, save_json, save_tensors
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError, first_few
from utils.run.checkpoint import open_checkpoint
from utils.run.command import CommandLine, command
from utils.run.console import progress
from utils.run.machine import device_from, keep_freed_memory

STEP = SAMPLES_PER_FRAME / SAMPLE_RATE  # seconds between frames
DECISIVE = (  # flags that features depend on
    "pathCheckpoint", "addCriterion", "oneHot", "maxSizeSeq", "format", "strict", "getEncoded",
    "clusters", "seqNorm",
)  # fmt: skip


@command
def main(argv=None):
    args = parse_arguments(argv)
    keep_freed_memory()
    outputs = name_outputs(args)
    module = build_module(args).to(device_from(args.device))
    open_folder(args)
    remaining = {path: output for path, output in outputs.items() if not output.exists()}
    if len(remaining) < len(outputs):
        print(
            f"{len(outputs) - len(remaining)} of {len(outputs)} files have their features already"
        )
    failures = write_features(module, remaining, args)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(outputs)} files have no features: {first_few(failures, 3)}"
        )
    print(f"features of {len(outputs)} files: {args.pathOut}; their flags: {record_of(args)}")


# ---------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """The arguments, checked and completed. Raises UserError with the flag and the cure."""
    args = build_parser().parse_args(argv)
    refuse_unavailable(args)
    if args.oneHot and not args.addCriterion:
        raise UserError("--oneHot needs --addCriterion")
    for name in ("getEncoded", "clusters"):
        if args.addCriterion and getattr(args, name):
            raise UserError(f"--addCriterion gives probabilities of phones: leave out --{name}")
    if args.maxSizeSeq < SAMPLES_PER_FRAME:
        raise UserError(f"--maxSizeSeq {args.maxSizeSeq}: at least {SAMPLES_PER_FRAME} samples")
    if not os.path.isdir(args.pathDB):
        raise UserError(f"{args.pathDB}: no such directory")
    args.pathCheckpoint = os.path.abspath(open_checkpoint(args.pathCheckpoint).path)
    args.pathOut = os.path.abspath(args.pathOut)
    args.clusters = args.clusters and os.path.abspath(args.clusters)
    args.strict = args.strict or args.seqNorm  # a short chunk can't be normalised well
    return args


def refuse_unavailable(args):
    """The original's flags that have no meaning here, each with the reason."""
    for given, reason in (
        (
            args.format == "af",
            "--format af: files of the ArrayFire library, which nothing here reads or needs; npy "
            "holds the same",
        ),
        (
            args.dimReduction or args.centroidLimits,
            "--dimReduction and --centroidLimits: the format of these files was never published; "
            "write the features as npy and project them yourself",
        ),
        (
            args.train_mode,
            "--train_mode: with dropout and batch norm at work, the features of a file would "
            "depend on chance; leave it out",
        ),
    ):
        if given:
            raise UserError(reason)


def build_parser():
    parser = CommandLine(
        prog="build_zeroSpeech_features.py", description="Features of all audio files of a folder."
    )
    add = parser.add_argument
    add("pathDB", help="folder of the audio files; those in its folders count, too")
    add("pathOut", help="folder to write the features to")
    add("pathCheckpoint", help="checkpoint, or a run's directory for the newest in it")
    add(
        "--extension",
        "--file_extension",
        default=".wav",
        metavar="EXT",
        help="end of the audio files' names (default: .wav)",
    )
    add(
        "--format",
        choices=["npz", "fea", "npy", "pt", "af"],
        default="fea",
        help="of the features' files; fea is text (default: fea)",
    )
    add_feature_flags(parser.add_argument_group("features"))
    add_other_flags(parser.add_argument_group("machine, and flags that are refused"))
    return parser


def add_feature_flags(group):
    add = group.add_argument
    add("--getEncoded", action="store_true", help="encoded frames instead of contexts")
    add(
        "--addCriterion",
        action="store_true",
        help="probabilities of phones, by the classifier in the checkpoint",
    )
    add("--oneHot", action="store_true", help="1 for the likeliest phone (needs --addCriterion)")
    add(
        "--clusters",
        metavar="FILE",
        help="squared distances to these centers: .npy, .txt, or .pt of a clustering",
    )
    add("--seqNorm", action="store_true", help="zero mean, unit variance over time (and --strict)")
    add(
        "--strict",
        action="store_true",
        help="let the last part of a file begin earlier instead of being shorter than the others",
    )
    add(
        "--maxSizeSeq",
        type=int,
        default=64000,
        metavar="SAMPLES",
        help="samples that go through the model at once (default: 64000, 4 s)",
    )


def add_other_flags(group):
    add = group.add_argument
    add(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto: CUDA where there is one (default: auto)",
    )
    add("--train_mode", action="store_true", help="refused: features would depend on chance")
    add("--dimReduction", metavar="FILE", help="refused: its format was never published")
    add("--centroidLimits", nargs=2, type=int, metavar="N", help="refused with --dimReduction")


# ----------------------------------------------------------------------------------- features


class ClusterDistances(FeatureModule):
    """Squared distances of a model's features to centers, (k, D)."""

    def __init__(self, model, get_encoded, centers):
        super().__init__(model, get_encoded)
        self.register_buffer("centers", centers)

    def forward(self, waveform, continues=None):
        """waveform: (B, 1, L) -> (B, S, k)."""
        return squared_distances(super().forward(waveform, continues), self.centers)


def build_module(args):
    """What makes features of waveforms, as the flags say."""
    model, *_ = load_model([args.pathCheckpoint])
    if args.addCriterion:
        classifier = load_phone_classifier(args.pathCheckpoint)
        return ModelPhoneCombined(model, classifier, args.oneHot)
    if not args.clusters:
        return FeatureModule(model, args.getEncoded)
    module = ClusterDistances(model, args.getEncoded, read_centers(args.clusters, "--clusters"))
    if module.centers.shape[1] != module.dim_output:
        raise UserError(
            f"--clusters {args.clusters}: centers of {module.centers.shape[1]} dimensions for "
            f"features of {module.dim_output}"
        )
    return module


def write_features(module, outputs, args):
    """Write the features of each file. Returns a line for each that can't be used."""
    failures = []
    for path, output in progress(outputs.items(), what="features", unit=" files"):
        try:
            features = build_feature(
                module,
                os.path.join(args.pathDB, path),
                strict=args.strict,
                max_size=args.maxSizeSeq,
                seq_norm=args.seqNorm,
            )
        except UserError as error:
            failures.append(str(error))
            continue
        try:
            WRITERS[args.format](output, features[0])
        except OSError as error:
            raise UserError(f"{output}: can't be written ({error.strerror})") from error
    return failures


# ---------------------------------------------------------------------------------- the files


def name_outputs(args):
    """The output file of each audio file: path below `pathDB` -> Path.

    Raises UserError if two would be the same.
    """
    outputs, taken = {}, {}
    for path in find_files(args.pathDB, args.extension):
        name = os.path.basename(path)[: -len(args.extension) or None]
        if name in taken:
            raise UserError(
                f"{taken[name]} and {path} would both become {name}.{args.format}: "
                "build the features of their folders separately"
            )
        taken[name] = path
        outputs[path] = Path(args.pathOut, f"{name}.{args.format}")
    return outputs


def record_of(args):
    """The file beside the folder that keeps the flags."""
    return Path(f"{args.pathOut}.json")


def open_folder(args):
    """Make the folder and keep the flags beside it.

    Raises UserError if it holds features that other flags made.
    """
    record = record_of(args)
    before = load_json(record) if record.is_file() else {}
    differing = [name for name in DECISIVE if before.get(name) != getattr(args, name)]
    if before and differing and os.path.isdir(args.pathOut) and os.listdir(args.pathOut):
        raise UserError(
            f"{args.pathOut}: holds features made with another --{differing[0]} "
            f"({before.get(differing[0])}): name another folder, or remove this one"
        )
    try:
        os.makedirs(args.pathOut, exist_ok=True)
        remove_leftovers(args.pathOut)
        save_json(record, vars(args))
    except OSError as error:
        raise UserError(f"{args.pathOut}: can't be written to ({error.strerror})") from error


def frame_times(n_frames):
    """The middle of each frame, in seconds."""
    return [STEP / 2 + frame * STEP for frame in range(n_frames)]


def write_npz(path, features):
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            time=frame_times(len(features)),
            features=features.float().numpy(),
            totTime=np.array([STEP * len(features)], dtype=np.float32),
        )


def write_npy(path, features):
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, features.float().numpy())


def write_fea(path, features):
    with atomic_path(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        for time, values in zip(frame_times(len(features)), features.tolist(), strict=True):
            file.write(" ".join(map(str, [time, *values])) + "\n")


WRITERS = {"npz": write_npz, "npy": write_npy, "fea": write_fea, "pt": save_tensors}


if __name__ == "__main__":
    main()
