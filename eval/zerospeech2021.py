"""A submission to the phonetic task of the ZeroSpeech challenge 2021: features, or units.

    python eval/zerospeech2021.py DATASET OUT CHECKPOINT.pt --getEncoded
    python eval/zerospeech2021.py DATASET OUT CHECKPOINT.pt --clusters CLUSTERS --oneHot
    python eval/zerospeech2021.py DATASET OUT units/quantized_outputs.txt

DATASET is the challenge's folder, with `phonetic/dev-clean/*.wav` and three more sets. OUT gets

    phonetic/dev-clean/<name>.npy   and so on: (frames, D) float64, a frame per 10 ms; of units,
                                    which come from `eval/quantize.py` without --dedup, D is their
                                    number, with a 1 at the frame's unit and 0 elsewhere
    params.yaml                     the time between frames, and the distance
    meta.yaml                       who and what, for you to fill in (it isn't written again)
    code/README.md                  the program that was used

Flags of features are those of `eval/build_zeroSpeech_features.py`; `OUT.json` keeps them. If a call
is interrupted, the same call resumes it. The challenge's newer toolkit (task abxLS) takes
OUT/phonetic.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch

from eval.build_zeroSpeech_features import (
    STEP,
    add_feature_flags,
    complete,
    features_of_model,
    write_features,
)
from eval.units import one_hot, read_units
from utils.data.audio import read_header
from utils.data.labels import differ_widely
from utils.data.listing import choose_extension, find_files
from utils.data.names import known_key, name_of
from utils.files import save_array, write_lines, writing_to
from utils.misc import SAMPLES_PER_FRAME, UserError
from utils.run.command import CommandLine, command
from utils.run.machine import prepare_device
from utils.run.shared_flags import add_device, add_extension

TASK = "phonetic"
SETS = ("dev-clean", "dev-other", "test-clean", "test-other")
FEATURE_FLAGS = (  # of a checkpoint's features
    "getEncoded", "addCriterion", "oneHot", "clusters", "seqNorm", "feature_norm", "strict",
    "maxSizeSeq",
)  # fmt: skip
FEWEST_FRAMES = 2  # of a file, by the challenge's rules
PARAMS = f"""\
feature_size: {STEP}
metric: cosine
"""
META = f"""\
author: ""  # fill in
affiliation: ""  # fill in
description: ""  # fill in: model, layer, units
open_source: true
train_set: ""  # fill in
gpu_budget: ""  # fill in: hours of training, on all GPUs together
parameters:
  phonetic:
    metric: cosine
    frame_shift: {STEP}
"""
CODE = "Made by eval/zerospeech2021.py of this program: link to your version of it here.\n"


@command
def main(argv=None):
    args = parse_arguments(argv)
    prepare_device(args.device)
    outputs = name_outputs(args)
    features_of = one_hot_units(args) if args.of_units else features_of_model(args, outputs)
    write_features(lambda path: accepted(features_of(path), path), outputs, save_array, args)
    texts = {"params.yaml": PARAMS, "meta.yaml": META, "code/README.md": CODE}
    for name, text in texts.items():
        path = Path(args.pathOut, name)
        if not path.exists():
            with writing_to(path):
                write_lines(path, text.splitlines())
    print(f"before you submit {args.pathOut}: fill in its meta.yaml")


# ---------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """The arguments, checked and completed. Raises UserError for those that can't work."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not os.path.isdir(Path(args.pathDB, TASK)):
        raise UserError(f"{args.pathDB}: has no folder {TASK}: the challenge's dataset is needed")
    if args.feature_norm == "speaker":
        raise UserError("--feature_norm speaker: the challenge's files don't say who speaks")
    args.of_units = args.pathCheckpoint.endswith(".txt")
    if not args.of_units:
        return complete(args)
    for name in FEATURE_FLAGS:
        if getattr(args, name) != parser.get_default(name):
            raise UserError(
                f"--{name} is for features of a checkpoint, not for units: leave it out"
            )
    args.extension = choose_extension(args.pathDB, args.extension)
    args.pathCheckpoint, args.pathOut = map(os.path.abspath, (args.pathCheckpoint, args.pathOut))
    return args


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="zerospeech2021.py", description=__doc__)
    add = parser.add_argument
    add("pathDB", metavar="DATASET", help="folder of the challenge's audio, with phonetic/ in it")
    add("pathOut", metavar="OUT", help="folder of the submission")
    add("pathCheckpoint", metavar="SOURCE",
        help="checkpoint, or a run's directory for the newest in it, or quantized_outputs.txt of "
        "quantize.py")
    add_extension(add, "--extension")
    add_feature_flags(parser.add_argument_group("features").add_argument)
    add_device(add)
    parser.set_defaults(format="npy")
    return parser


# fmt: on
# ----------------------------------------------------------------------------------- features


def name_outputs(args):
    """Path below DATASET -> file of the submission. Raises UserError without any set."""
    outputs = {}
    for path in find_files(Path(args.pathDB, TASK), args.extension):
        folder, name = os.path.dirname(path), name_of(path, args.extension)
        if folder in SETS:
            outputs[f"{TASK}/{path}"] = Path(args.pathOut, TASK, folder, f"{name}.npy")
    there = {output.parent.name for output in outputs.values()}
    missing = ", ".join(name for name in SETS if name not in there)
    if not there:
        raise UserError(f"{args.pathDB}/{TASK}: has none of {missing}")
    if missing:
        print(f"note: {args.pathDB}/{TASK} has no {missing}: the challenge wants all four sets")
    return outputs


def one_hot_units(args):
    """A function: path below DATASET -> (T, K), 1 at the unit of each frame and 0 elsewhere."""
    units_of = read_units(args.pathCheckpoint)
    n_units = 1 + max(int(units.max()) for units in units_of.values())

    def rows(path):
        below = path.removeprefix(f"{TASK}/")
        key = known_key(below, name_of(path, args.extension), units_of)
        if key is None:
            raise UserError(f"{path}: has no units in {args.pathCheckpoint}")
        header = read_header(os.path.join(args.pathDB, path))
        units, n_frames = units_of[key], header.samples // SAMPLES_PER_FRAME
        if differ_widely(len(units), n_frames):
            raise UserError(f"{path}: {len(units)} units for {n_frames} frames: made with --dedup?")
        return torch.from_numpy(one_hot(units, n_units))

    return rows


def accepted(features, path):
    """Features (T, D) of a file as the challenge takes them. Raises UserError where it wouldn't."""
    if len(features) < FEWEST_FRAMES:
        raise UserError(f"{path}: has only {len(features)} frame, the challenge wants two")
    if not features.isfinite().all():
        raise UserError(f"{path}: the model's features of this file aren't finite")
    return features.double().numpy()


if __name__ == "__main__":
    main()
