"""Features of all audio files in a folder, one file each, as for the ZeroSpeech challenge.

    python eval/build_zeroSpeech_features.py AUDIO OUT CHECKPOINT.pt --format npz --strict
    python eval/build_zeroSpeech_features.py AUDIO OUT CHECKPOINT.pt --format pt --extension .flac
    python eval/build_zeroSpeech_features.py AUDIO OUT CLASSIFIER.pt --addCriterion
    python eval/build_zeroSpeech_features.py AUDIO OUT CHECKPOINT.pt --clusters CLUSTERS --oneHot

`OUT/<name>.<format>` holds the features of `<name><extension>`, T frames of 10 ms with D values
(`OUT/<folder>/<name>.<format>` if files in several folders have the same name):

    npz   `features` (T, D) float32, `time` (T,) the middle of each frame and `totTime` (1,) the
          length of the file, both in seconds
    npy   only the features
    pt    only the features, as a PyTorch tensor that `eval/ABX.py from_pre_computed` reads
    fea   text, one frame per line: time and values, separated by spaces

The flags are written to `OUT.json`, beside the folder. If a call is interrupted, the same call
resumes it.
"""

import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import numpy as np

from eval.units import ClusterFeatures, check_width, feature_module, read_frame_clusters
from feature_loader import (
    FeatureModule,
    ModelPhoneCombined,
    build_feature,
    load_model,
    load_phone_classifier,
)
from utils.data.corpus import listed_files
from utils.data.listing import choose_extension
from utils.files import (
    atomic_path,
    load_json,
    remove_leftovers,
    save_array,
    save_json,
    save_tensors,
    writing_to,
)
from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME, UserError, first_few
from utils.normalisation import NormalisedFeatures
from utils.run.checkpoint import open_checkpoint
from utils.run.command import CommandLine, at_least, command
from utils.run.console import progress
from utils.run.machine import device_from, prepare_device
from utils.run.shared_flags import (
    add_device,
    add_extension,
    add_feature_norm,
    add_level,
    check_same_flags,
)

STEP = SAMPLES_PER_FRAME / SAMPLE_RATE  # seconds between frames
DECISIVE = (  # flags that the features depend on
    "pathCheckpoint", "addCriterion", "oneHot", "maxSizeSeq", "format", "strict", "getEncoded",
    "clusters", "seqNorm", "feature_norm", "speaker_level", "level",
)  # fmt: skip


@command
def main(argv=None):
    args = parse_arguments(argv)
    prepare_device(args.device)
    outputs = name_outputs(args)
    write_features(features_of_model(args, outputs), outputs, WRITERS[args.format], args)


# ---------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """The arguments, checked and completed. Raises UserError for those that can't work."""
    args = build_parser().parse_args(argv)
    check_available(args)
    return complete(args)


def complete(args):
    """Check and complete the flags of features, in place."""
    if args.oneHot and not (args.addCriterion or args.clusters):
        raise UserError("--oneHot needs --addCriterion or --clusters FILE")
    if args.addCriterion and args.level == "segments":
        raise UserError("--level segments: not with --addCriterion, whose classifier takes frames")
    for name in ("getEncoded", "clusters"):
        if args.addCriterion and getattr(args, name):
            raise UserError(f"--addCriterion writes phone probabilities: leave out --{name}")
    if not os.path.isdir(args.pathDB):
        raise UserError(f"{args.pathDB}: no such directory")
    args.extension = choose_extension(args.pathDB, args.extension)
    args.pathCheckpoint = os.path.abspath(open_checkpoint(args.pathCheckpoint).path)
    args.pathOut = os.path.abspath(args.pathOut)
    args.clusters = args.clusters and os.path.abspath(args.clusters)
    if args.feature_norm != "none" and (args.addCriterion or args.clusters or args.seqNorm):
        raise UserError("--feature_norm: leave out --addCriterion, --clusters and --seqNorm")
    args.strict = args.strict or args.seqNorm  # a short chunk can't be normalised well
    return args


def check_available(args):
    """Refuse the original's flags that have no meaning here, each with the reason."""
    if args.format == "af":
        raise UserError(
            "--format af: the ArrayFire library isn't supported; --format npy stores the same"
        )
    if args.dimReduction or args.centroidLimits:
        raise UserError(
            "--dimReduction and --centroidLimits: the format of their files was never published; "
            "write the features as npy and project them yourself"
        )
    if args.train_mode:
        raise UserError(
            "--train_mode: with dropout and batch norm in training mode, features would be random; "
            "leave it out"
        )


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="build_zeroSpeech_features.py", description=__doc__)
    add = parser.add_argument
    add("pathDB", help="folder of the audio files; subfolders are included")
    add("pathOut", help="folder to write the features to")
    add("pathCheckpoint", help="checkpoint, or a run's directory for the newest in it")
    add_extension(add, "--extension")
    add("--seqList", metavar="FILE", help="use only these files, one name per line")
    add("--format", choices=["npz", "fea", "npy", "pt", "af"], default="fea",
        help="of the feature files; fea is text")
    add_feature_flags(parser.add_argument_group("features").add_argument)
    add_other_flags(parser.add_argument_group("machine, and unsupported flags").add_argument)
    return parser


def add_feature_flags(add):
    add("--getEncoded", action="store_true", help="encoded frames instead of contexts")
    add_level(add)
    add("--addCriterion", action="store_true",
        help="phone probabilities, by the classifier in the checkpoint")
    add("--oneHot", action="store_true",
        help="1 for the most probable phone, or the unit, 0 for all others (needs --addCriterion "
        "or --clusters)")
    add("--clusters", metavar="FILE",
        help="squared distances to the centers of eval/cluster.py, or of another .pt, .npy or .txt")
    add("--seqNorm", action="store_true",
        help="scale each file, or chunk, to zero mean and unit variance (implies --strict)")
    add_feature_norm(add, " (of speakers: in a second pass)")
    add("--speaker_level", type=at_least(1), default=1, metavar="N",
        help="number of folders below pathDB that name the speaker of a file")
    add("--strict", action="store_true",
        help="start the last chunk of a file earlier instead of making it shorter")
    add("--maxSizeSeq", type=at_least(SAMPLES_PER_FRAME), metavar="SAMPLES",
        help="cut files into chunks, as the original program did: its default was 64000 (4 s)")


def add_other_flags(add):
    add_device(add)
    add("--train_mode", action="store_true", help="refused: features would be random")
    add("--dimReduction", metavar="FILE", help="refused: its format was never published")
    add("--centroidLimits", nargs=2, type=int, metavar="N", help="refused, like --dimReduction")


# fmt: on
# ----------------------------------------------------------------------------------- features


def build_module(args):
    """The module that computes features from waveforms, according to the flags."""
    if args.clusters:
        get_encoded = args.getEncoded
        clusters = read_frame_clusters(
            args.clusters, args.pathCheckpoint, get_encoded=get_encoded, level=args.level
        )
        module = feature_module(clusters.features, "cpu")
        check_width(clusters, module.dim_output)
        return ClusterFeatures(module.model, clusters, args.oneHot)
    model, *_ = load_model([args.pathCheckpoint], level=args.level)
    if args.addCriterion:
        classifier = load_phone_classifier(args.pathCheckpoint)
        return ModelPhoneCombined(model, classifier, args.oneHot)
    return FeatureModule(model, args.getEncoded)


def features_of_model(args, paths):
    """A function: path below `pathDB` -> the features of that file, (T, D); paths: of all files."""
    features_of = partial(features_of_file, build_module(args).to(device_from(args.device)), args)
    if args.feature_norm == "none":
        return features_of
    speakers = speakers_of(paths, args.speaker_level) if args.feature_norm == "speaker" else {}
    return NormalisedFeatures(features_of, args.feature_norm, speakers)


def write_features(features_of, outputs, write, args):
    """Write the features of all files that don't have theirs yet.

    features_of: path below `pathDB` -> (T, D); outputs: the same -> Path; write: takes a Path and
    features. Raises UserError if some can't be used, after the others are written.
    """
    open_folder(args)
    remaining, failures = {p: output for p, output in outputs.items() if not output.exists()}, []
    if len(remaining) < len(outputs):
        print(
            f"{len(outputs) - len(remaining)} of {len(outputs)} files already have their features"
        )
    for path, output in progress(remaining.items(), what="features", unit=" files"):
        try:
            features = features_of(path)
        except UserError as error:
            failures.append(str(error))
            continue
        with writing_to(output):
            write(output, features)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(outputs)} files have no features: {first_few(failures, 3)}"
        )
    print(f"features of {len(outputs)} files: {args.pathOut}; their flags: {record_of(args)}")


def features_of_file(module, args, path):
    """The features of an audio file, (T, D)."""
    return build_feature(
        module,
        os.path.join(args.pathDB, path),
        strict=args.strict,
        max_size=args.maxSizeSeq,
        seq_norm=args.seqNorm,
    )[0]


def speakers_of(paths, level):
    """Path -> speaker, the first `level` folders. Raises UserError for a path without any."""
    speakers = {path: "/".join(path.split("/")[:-1][:level]) for path in paths}
    for path, speaker in speakers.items():
        if not speaker:
            raise UserError(f"--feature_norm speaker: {path} isn't in a speaker's folder")
    return speakers


# ---------------------------------------------------------------------------------- the files


def name_outputs(args):
    """The output file of each listed audio file: path below `pathDB` -> Path."""
    paths = listed_files(args.pathDB, args.extension, args.seqList)
    return {path: Path(args.pathOut, f"{name}.{args.format}") for name, path in paths.items()}


def record_of(args):
    """The file of flags beside the folder."""
    return Path(f"{args.pathOut}.json")


def open_folder(args):
    """Make the folder and write the flags beside it.

    Raises UserError if it holds features made with other flags.
    """
    record = record_of(args)
    stored = load_json(record) if record.is_file() else {}
    if stored and os.path.isdir(args.pathOut) and os.listdir(args.pathOut):
        stored = {"feature_norm": "none", "speaker_level": 1} | stored  # older ones don't have them
        check_same_flags(args.pathOut, stored, args, DECISIVE, "features")
    with writing_to(args.pathOut):
        os.makedirs(args.pathOut, exist_ok=True)
        remove_leftovers(args.pathOut)
        save_json(record, vars(args))


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
    save_array(path, features.float().numpy())


def write_fea(path, features):
    with atomic_path(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        for time, values in zip(frame_times(len(features)), features.tolist(), strict=True):
            file.write(" ".join(map(str, [time, *values])) + "\n")


WRITERS = {"npz": write_npz, "npy": write_npy, "fea": write_fea, "pt": save_tensors}


if __name__ == "__main__":
    main()
