"""How much the discrete units of speech change where it is augmented: unit edit distance (UED).

    python eval/unit_robustness.py CLUSTERS DB OUT --augment_type pitch additive reverb

For each type, and for their chain: the edit distance between the units of a file and those of its
augmented copy, both without repetitions, divided by the number of the former, on average over files
(Gat et al., "Augmentation invariant discrete representation for generative spoken language
modeling", 2022, arXiv:2209.15483). 0 %: the units are those of the clean speech. Compare with the
same number of units only: more of them change more easily.

CLUSTERS comes from `eval/cluster.py`, or is another file of centers, for which --pathCheckpoint
names the model. Flags of augmentation are those of train.py, except that noise is coloured noise
without --pathDBNoise; eval/hear_augmentation.py makes them audible. OUT gets
`unit_robustness.json`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch

from criterion.seq_alignment import phone_error_rate
from eval.hear_augmentation import each_and_all, open_augmentation, parse_with_augmentation
from eval.quantize import (
    add_corpus_flags,
    add_model_flags,
    open_clusters,
    units_of,
    wanted_files,
)
from eval.units import deduplicated, report_unusable
from feature_loader import load_waveform
from utils.data.listing import choose_extension
from utils.files import check_writable, save_json, writing_to
from utils.misc import SAMPLE_RATE, UserError, counted, generator_from, percent
from utils.run.command import CommandLine, at_least, command
from utils.run.console import progress
from utils.run.machine import prepare_device
from utils.run.shared_flags import add_device


@command
def main(argv=None):
    args = parse_arguments(argv)
    prepare_device(args.device)
    clusters, module = open_clusters(args)
    paths = some_files(args)
    effects = each_and_all(args.augment_type or [])
    augmentation = open_augmentation(args, SAMPLE_RATE)
    found, problems = {name: [] for name in ("clean", *effects)}, []
    for name, path in progress(paths.items(), what="unit edit distance", unit=" files"):
        path = os.path.join(args.pathDB, path)
        try:
            copies = {"clean": load_waveform(path)}
            for effect, types in effects.items():
                copies[effect] = augmentation.copy(copies["clean"], types, name)
            units = {kind: units_of(module, clusters, path, copies[kind]) for kind in found}
        except UserError as error:
            problems.append(str(error))
            continue
        for kind, of_file in units.items():
            found[kind].append(deduplicated(of_file).tolist())
    report_unusable(problems, len(paths))
    clean = found.pop("clean")
    distances = {effect: phone_error_rate(units, clean) for effect, units in found.items()}
    result = {"files": len(clean), "n_units": len(clusters.centers), "ued": distances}
    with writing_to(args.out):
        save_json(Path(args.out, "unit_robustness.json"), {**result, "flags": vars(args)})
    print(f"unit edit distance of {counted(len(clean), 'file')}, {len(clusters.centers)} units:")
    for name, types in effects.items():
        print(f"{percent(distances[name]):>10}  {' '.join(types)}")
    print(f"results: {args.out}/unit_robustness.json")


def some_files(args):
    """Name -> path below `pathDB` of at most --max_files files, at random."""
    paths = list(wanted_files(args).items())
    order = torch.randperm(len(paths), generator=generator_from(args.random_seed, "files"))
    return dict(sorted(paths[i] for i in order[: args.max_files].tolist()))


def parse_arguments(argv=None):
    """The arguments, checked and completed. Raises UserError for those that can't work."""
    args = parse_with_augmentation(build_parser(), argv)
    if not os.path.isdir(args.pathDB):
        raise UserError(f"{args.pathDB}: no such directory")
    check_writable(args.out, f"{args.out}: results")
    args.file_extension = choose_extension(args.pathDB, args.file_extension)
    return args


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="unit_robustness.py", description=__doc__)
    add = parser.add_argument
    add_corpus_flags(add)
    add("--max_files", type=at_least(1), default=100, metavar="N",
        help="measure at most N of them, at random (default: 100)")
    add_device(add)
    add_model_flags(parser)
    parser.set_defaults(split=None)
    return parser


# fmt: on


if __name__ == "__main__":
    main()
