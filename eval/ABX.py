"""ABX discriminability: how often a phone is nearer to another phone than to its own kind.

    python eval/ABX.py from_checkpoint CHECKPOINT.pt ITEMS.item AUDIO --seq_norm --strict \\
        --file_extension .flac --out OUT
    python eval/ABX.py from_pre_computed FEATURES ITEMS.item --file_extension .npy --out OUT

A and X are two examples of a phone in the same context, B is an example of another phone by the
speaker of A; X is by the same speaker ("within") or by another one ("across"). The score is the
fraction of such triplets in which X is nearer to B: 0 is perfect, 0.5 is chance. The distance is
dynamic time warping over the distances between frames (eval/dtw.py).

Item files are those of the ZeroSpeech challenges of 2017 and 2021; utils/corpus/make_abx_item.py
makes one from phone labels. `OUT/ABX_scores.json` holds the scores, their numbers of triplets and
what they were measured on; `OUT/ABX_args.json` holds the flags.
"""

import os
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import numpy as np
import torch

from dataset import refuse_too_many
from eval.abx_fastabx import fastabx_errors, require_fastabx
from eval.abx_groups import (
    across_cells,
    cell_errors,
    count_triplets,
    group_items,
    mean_error,
    within_cells,
)
from eval.abx_items import SLICINGS, cut_items, read_items
from eval.dtw import FRAME_DISTANCES
from feature_loader import build_feature, load_model
from segments import layer_name
from utils.data.listing import AUDIO, choose_extension
from utils.data.names import files_by_key
from utils.files import load_array, load_tensors, save_json, writing_to
from utils.hidden_state import KeepsHidden
from utils.misc import SAMPLES_PER_FRAME, UserError, first_few
from utils.normalisation import NormalisedFeatures
from utils.run.checkpoint import open_checkpoint
from utils.run.command import CommandLine, DefaultExtension, above, at_least, command
from utils.run.machine import device_from, prepare_device
from utils.run.shared_flags import add_device, add_extension, add_feature_norm, add_level

NO_TRIPLET = {
    "within": "it takes two examples of a phone by one speaker, and another phone in the context",
    "across": "it takes a phone by two speakers, and another phone in the same context",
}
CONTEXTS = {
    "within": "A, B and X have the same phones around them",
    "any": "A, B and X may have different phones around them",
}
MODES = {"all": ("within", "across"), "within": ("within",), "across": ("across",)}
DEBUG_FILES = 1000


@command
def main(argv=None):
    args = parse_arguments(argv)
    prepare_device(args.device)
    library = require_fastabx() if args.fastabx else "built in"
    items = read_items(args.path_item_file, args.context == "any")
    if args.debug:
        items = items.of_files(DEBUG_FILES)
    paths = find_paths(args, items)
    features_of = features_of_checkpoint if args.load == "from_checkpoint" else stored_features
    features = features_of(args, paths)
    if args.feature_norm != "none":
        speakers = speakers_of(items) if args.feature_norm == "speaker" else {}
        features = NormalisedFeatures(features, args.feature_norm, speakers)
    kept, frames = cut_items(items, features, 1 / args.feature_size, args.slicing)
    measured_on = {
        **source(args),
        "item_file": args.path_item_file,
        "items": len(items),
        "items_with_frames": len(kept),
        "slicing": f"{args.slicing}: {SLICINGS[args.slicing]}",
        "seconds_per_frame": args.feature_size,
        "feature_norm": args.feature_norm,
        "metric": args.distance_mode,
        "context": f"{args.context}: {CONTEXTS[args.context]}",
        "max_size_group": args.max_size_group,
        "max_x_across": args.max_x_across,
        "seed": args.seed,
        "library": library,
    }
    scores, triplets = score_items(kept, frames, args)
    if not any(triplets.values()):
        raise UserError(nothing_to_compare(args, len(kept)))
    result = {**scores, "triplets": triplets, "measured_on": measured_on}
    with writing_to(args.out, "--out"):
        save_json(Path(args.out, "ABX_scores.json"), result)
        save_json(Path(args.out, "ABX_args.json"), vars(args))
    show(scores, triplets, measured_on, args.out)


def score_items(items, frames, args):
    """Scores and numbers of triplets of `items`, whose frames are the `Frames`.

    Two dicts with the keys "within" and "across": of floats (None without triplets), and of ints.
    """
    frames = frames.normalized().to(device_from(args.device))
    groups = group_items(items, args.max_size_group, args.seed)
    errors_of = fastabx_errors if args.fastabx else cell_errors
    scores, triplets = {}, {}
    for mode in MODES[args.mode]:
        if mode == "within":
            cells = within_cells(groups)
        else:
            cells = across_cells(groups, args.max_x_across, args.seed)
        scores[mode] = None
        triplets[mode] = int(count_triplets(groups, cells).sum())
        if len(cells):
            errors = errors_of(groups, cells, frames, args.distance_mode)
            scores[mode] = mean_error(groups, cells, errors)
    return scores, triplets


def nothing_to_compare(args, n_items):
    """The message if there is no triplet at all, with what to do."""
    needs = "; ".join(f"{mode} speakers, {NO_TRIPLET[mode]}" for mode in MODES[args.mode])
    wider = "; --context any compares phones whatever their neighbours"
    return (
        f"{args.path_item_file}: no triplet among its {n_items} items with features: {needs}"
        f"{wider if args.context == 'within' else ''}"
    )


def show(scores, triplets, measured_on, out):
    for mode, score in scores.items():
        if score is None:
            print(f"ABX {mode} speakers: no triplet among these items; {NO_TRIPLET[mode]}")
        else:
            print(f"ABX error {mode} speakers: {100 * score:.2f} % ({triplets[mode]:,} triplets)")
    kept, items = measured_on["items_with_frames"], measured_on["items"]
    print(f"{kept} of {items} items have features; {os.path.join(out, 'ABX_scores.json')}")


# ---------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """The arguments, checked and completed. Raises UserError for those that can't work."""
    args = build_parser().parse_args(argv)
    if args.distance_mode == "euclidian":
        args.distance_mode = "euclidean"
    folder = args.path_audio_data if args.load == "from_checkpoint" else args.path_features
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such directory")
    kinds = AUDIO if args.load == "from_checkpoint" else READERS
    args.file_extension = choose_extension(folder, args.file_extension, kinds)
    if args.load == "from_checkpoint":
        args.path_checkpoint = os.path.abspath(open_checkpoint(args.path_checkpoint).path)
        folder = os.path.dirname(args.path_checkpoint)
        if args.seq_norm and args.feature_norm != "none":
            raise UserError(
                f"--seq_norm and --feature_norm {args.feature_norm}: choose one of them"
            )
    args.out = os.path.abspath(args.out or folder)
    device_from(args.device)
    return args


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="ABX.py", description=__doc__)
    commands = parser.add_subparsers(dest="load", required=True, metavar="COMMAND")
    model = commands.add_parser("from_checkpoint", help="score the features of a CPC model")
    add = model.add_argument
    add("path_checkpoint", help="checkpoint, or a run's directory for the newest in it")
    add("path_item_file", help="item file, one item per line: `file onset offset phone prev next "
        "speaker`")
    add("path_audio_data", help="folder of the audio files; subfolders are included")
    add_extension(add)
    add("--get_encoded", action="store_true", help="score encoded frames instead of contexts")
    add_level(add)
    add("--seq_norm", action="store_true",
        help="normalise each file, or chunk, to zero mean and unit variance over time")
    add("--max_size_seq", type=at_least(SAMPLES_PER_FRAME), metavar="SAMPLES",
        help="cut files into chunks, as the original program did: its default was 64000 (4 s)")
    add("--strict", action="store_true",
        help="start the last chunk of a file earlier instead of making it shorter")
    add_shared_flags(model)
    stored = commands.add_parser("from_pre_computed", help="score features in files")
    add = stored.add_argument
    add("path_features", help="folder of the features, one file for each audio file")
    add("path_item_file", help="item file, as for from_checkpoint")
    add_extension(add, default=DefaultExtension(".pt"),
        files=f"feature files, one of {' '.join(READERS)}")
    add_shared_flags(stored)
    return parser


def add_shared_flags(parser):
    add_task_flags(parser.add_argument_group("what is compared").add_argument)
    add_sampling_flags(parser.add_argument_group("sampling").add_argument)
    add = parser.add_argument_group("computation and output").add_argument
    add("--fastabx", action="store_true",
        help="compare with the fastabx library (Python 3.12 or later; pip install fastabx)")
    add_device(add)
    add("--cuda", dest="device", action="store_const", const="cuda", help="--device cuda")
    add("--debug", action="store_true", help=f"use only items of the first {DEBUG_FILES} files")
    add("--out", metavar="DIR", help="for the scores (default: beside checkpoint or features)")


def add_task_flags(add):
    add("--mode", default="all", choices=list(MODES),
        help="X by the same speaker as A and B, by another, or both scores")
    add("--distance_mode", default="cosine", choices=[*FRAME_DISTANCES, "euclidian"],
        help="between frames, each scaled to length 1 (default: cosine, the angle between them)")
    add("--feature_size", type=above(0), default=0.01, metavar="SECONDS",
        help="time from one frame of features to the next")
    add("--slicing", default="librilight", choices=list(SLICINGS),
        help="; ".join(f"{name}: {rule}" for name, rule in SLICINGS.items())
        + " (default: librilight, as in the original program)")
    add_feature_norm(add, " of the item file")
    add("--context", default="within", choices=list(CONTEXTS),
        help="; ".join(f"{name}: {rule}" for name, rule in CONTEXTS.items()))


def add_sampling_flags(add):
    add("--max_size_group", type=at_least(2), default=10, metavar="N",
        help="examples of a phone in one context by one speaker; more are sampled")
    add("--max_x_across", type=at_least(1), default=5, metavar="N",
        help="speakers of X for each A; more are sampled")
    add("--seed", type=int, default=0, help="seed of the sampling")


# fmt: on
# ----------------------------------------------------------------------------------- features


def find_paths(args, items):
    """Name -> path of the files of `items`; prints the names that have no file."""
    root = args.path_audio_data if args.load == "from_checkpoint" else args.path_features
    wanted = dict.fromkeys(items.files)
    paths = files_by_key(root, args.file_extension, wanted, args.path_item_file)
    missing = [name for name in wanted if name not in paths]
    if missing:
        print(
            f"{args.path_item_file}: {len(missing)} of {len(wanted)} files aren't in {root}, "
            f"their items are left out: {first_few(missing)}"
        )
    return {name: os.path.join(root, path) for name, path in paths.items()}


def source(args):
    """The origin of the features, for the record."""
    if args.load == "from_pre_computed":
        return {"features": os.path.abspath(args.path_features), "layer": "as in these files"}
    return {
        "features": args.path_checkpoint,
        "layer": layer_name(args.get_encoded, args.level),
        "chunks": {name: vars(args)[name] for name in ("max_size_seq", "strict", "seq_norm")},
    }


def features_of_checkpoint(args, paths):
    """A function: name -> features (T, D) of that audio file, None without one.

    It also returns None for files that can't be used, and prints their names. Raises UserError if
    there are more of them than training tolerates.
    """
    problems, n_files = [], len(paths)
    model, *_ = load_model([args.path_checkpoint], level=args.level)
    model.to(device_from(args.device))
    for part in model.modules():
        if isinstance(part, KeepsHidden):
            part.keep_hidden = True  # between chunks; every file begins in the zero state

    def features(name):
        if name not in paths:
            return None
        try:
            return build_feature(
                model,
                paths[name],
                get_encoded=args.get_encoded,
                strict=args.strict,
                max_size=args.max_size_seq,
                seq_norm=args.seq_norm,
            )[0]
        except UserError as error:
            problems.append(str(error))
            refuse_too_many(problems, n_files)
            del paths[name]
            print(f"{error}; its items are left out")
            return None

    return features


def speakers_of(items):
    """Name -> speaker of the files of `items`. Raises UserError if one has several."""
    speakers = {}
    for name, speaker in zip(items.files, items.speaker.tolist(), strict=True):
        if speakers.setdefault(name, speaker) != speaker:
            raise UserError(f"--feature_norm speaker: {name} has items of several speakers")
    return speakers


def stored_features(args, paths):
    """A function: name -> features (T, D) from its file, None without one."""
    extension = os.path.splitext(args.file_extension)[1] or args.file_extension
    if extension not in READERS:
        raise UserError(f"--file_extension {args.file_extension}: not one of {' '.join(READERS)}")

    def features(name):
        return read_features(paths[name], READERS[extension]) if name in paths else None

    return features


def read_features(path, reader):
    """Features (T, D) float32 from a file. Raises UserError, naming it, if it holds none."""
    try:
        features = torch.as_tensor(reader(path))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: can't be read as features ({error})") from error
    if features.dim() == 3 and len(features) == 1:
        features = features[0]  # a batch of one file, as models return it
    if features.dim() != 2:
        raise UserError(f"{path}: of shape {tuple(features.shape)}, not (frames, dimensions)")
    return features.float()


READERS = {
    ".pt": load_tensors,
    ".npy": load_array,
    ".npz": lambda path: load_array(path)["features"],
    ".fea": lambda path: np.loadtxt(path, ndmin=2)[:, 1:],  # the first column is the time
    ".txt": lambda path: np.loadtxt(path, ndmin=2),  # as submitted to ZeroSpeech 2021
}


if __name__ == "__main__":
    main()
