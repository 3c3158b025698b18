"""The discrete units of a corpus: the nearest center of every frame.

    python eval/quantize.py CLUSTERS DB OUT
    python eval/quantize.py CLUSTERS.pt DB OUT --format km onehot-npy --split 1-4

CLUSTERS comes from `eval/cluster.py`, or is another file of centers, for which --pathCheckpoint
names the model. `OUT/quantized_outputs.txt` has one line per file, `name<TAB>unit,unit,...`, one
unit per 10 ms. Each file goes through the model by itself, as a whole, so its units don't depend on
other files. If a call is interrupted, the same call resumes it. Further formats:

    km          HuBERT's: OUT/quantized_outputs.km (units of one file per line, separated by
                blanks), .tsv (its files) and dict.km.txt
    onehot-npy  OUT/onehot/<name>.npy, (frames, K) float64, for eval/ABX.py and ZeroSpeech 2021
"""

import argparse
import contextlib
import os
import re
import sys
import zlib
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import numpy as np
import torch

from eval.cluster import add_feature_flags, warn_of_large_unit
from eval.units import (
    FEATURES,
    check_width,
    deduplicated,
    feature_module,
    features_to_cluster,
    one_hot,
    read_clusters,
    report_unusable,
    split_units,
    unit_line,
)
from utils.data.audio import read_header
from utils.data.corpus import listed_files
from utils.data.listing import choose_extension
from utils.files import lines_of, load_json, save_array, save_json, write_lines, writing_to
from utils.kmeans import assign
from utils.misc import UserError, counted, first_few
from utils.run.command import CommandLine, command
from utils.run.console import progress
from utils.run.machine import device_from, prepare_device
from utils.run.shared_flags import add_device, add_extension, check_same_flags

DECISIVE = ("clusters", "centers_crc", "pathDB", "file_extension", "dedup", *sorted(FEATURES))
FORMATS = ("km", "onehot-npy")


@command
def main(argv=None):
    args = parse_arguments(argv)
    prepare_device(args.device)
    clusters, module = open_clusters(args)
    args.clusters = os.path.abspath(clusters.path)
    paths = wanted_files(args)
    record_flags(args, clusters)
    out = Path(args.out, f"quantized_outputs{f'_split_{args.split}' * bool(args.split)}.txt")
    with writing_to(args.out):
        counts, n_files = quantize(module, clusters, paths, out, args)
        for kind in args.format:
            WRITERS[kind](out, paths, len(clusters.centers), args)
    n_used = int((counts > 0).sum())
    print(
        f"{counted(int(counts.sum()), 'unit')} of {counted(n_files, 'file')}, {n_used} of "
        f"{len(counts)} different ones: {out}"
    )
    warn_of_large_unit(counts.max() / max(counts.sum(), 1))


# ---------------------------------------------------------------------------------- arguments


def split(text):
    """A value of --split, checked."""
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: must be i-n, part i of n, from 1-n to n-n")
    return text


def parse_arguments(argv=None):
    """The arguments, checked and completed. Raises UserError for those that can't work."""
    args = build_parser().parse_args(argv)
    if not os.path.isdir(args.pathDB):
        raise UserError(f"{args.pathDB}: no such directory")
    if args.dedup and "onehot-npy" in args.format:
        raise UserError("--dedup with --format onehot-npy: its rows would be no frames; leave one")
    args.file_extension = choose_extension(args.pathDB, args.file_extension)
    args.pathDB, args.out = os.path.abspath(args.pathDB), os.path.abspath(args.out)
    if args.pathCheckpoint:
        args.pathCheckpoint = os.path.abspath(args.pathCheckpoint)
    return args


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="quantize.py", description=__doc__)
    add = parser.add_argument
    add_corpus_flags(add)
    add("--split", type=split, metavar="i-n", help="only part i of n, for several processes")
    add("--format", nargs="+", choices=FORMATS, default=[], metavar="FORMAT",
        help=f"write these, too: {' '.join(FORMATS)}")
    add("--dedup", action="store_true", help="write a unit once instead of for each of its frames")
    add_device(add)
    add_model_flags(parser)
    return parser


def add_corpus_flags(add):
    add("clusters", help="folder or file that eval/cluster.py wrote, or .pt, .npy, .txt of centers")
    add("pathDB", help="folder of the audio files; subfolders are included")
    add("out", help="folder for the results")
    add_extension(add)
    add("--pathSeq", metavar="FILE", help="use only these files, one name per line")


def add_model_flags(parser):
    add = parser.add_argument_group("features, where CLUSTERS doesn't say").add_argument
    add("--pathCheckpoint", metavar="FILE", help="the model; also where it is no longer there")
    add_feature_flags(add, default=None)


# fmt: on


def record_flags(args, clusters):
    """Write the flags into the folder. Raises UserError if it holds units made with others."""
    centers_crc = zlib.crc32(clusters.centers.numpy().tobytes())
    vars(args).update(clusters.features, centers_crc=centers_crc)
    record = Path(args.out, "args.json")
    if record.is_file():
        check_same_flags(args.out, load_json(record), args, DECISIVE, "units")
    with writing_to(args.out):
        save_json(record, {name: value for name, value in vars(args).items() if name != "split"})


# -------------------------------------------------------------------------------------- units


def open_clusters(args):
    """The `Clusters` that the flags name, and the module that computes their features."""
    clusters = read_clusters(args.clusters, {name: vars(args).get(name) for name in FEATURES})
    module = feature_module(clusters.features, device_from(args.device))
    check_width(clusters, module.dim_output)
    return clusters, module


def wanted_files(args):
    """Name -> path below `pathDB`, in the order of names; the part of them that --split names."""
    paths = listed_files(args.pathDB, args.file_extension, args.pathSeq)
    part, n_parts = map(int, (args.split or "1-1").split("-"))
    size = len(paths) // n_parts
    end = None if part == n_parts else part * size  # the last part has the remainder, too
    return dict(sorted(paths.items())[(part - 1) * size : end])


def quantize(module, clusters, paths, out, args):
    """Write the units of all files, resuming what an interrupted call wrote.

    Returns how often each unit occurs, (K,), and the number of files that have theirs. Raises
    UserError if too many are unusable.
    """
    counts, problems = np.zeros(len(clusters.centers), dtype=np.int64), []
    partial = out.with_name(f"{out.name}.part")
    done = keep_complete_lines(out if out.exists() else partial, paths, counts)
    if out.exists():
        os.replace(out, partial)
    if done:
        print(f"{len(done)} of {counted(len(paths), 'file')} already have their units")
    left = {name: path for name, path in paths.items() if name not in done}
    encoding = {"encoding": "utf-8", "errors": "surrogateescape"}
    with open(partial, "a", **encoding) as file:
        for name, path in progress(left.items(), what="units", unit=" files", total=len(left)):
            try:
                units = units_of(module, clusters, os.path.join(args.pathDB, path))
            except UserError as error:
                problems.append(str(error))
                continue
            units = deduplicated(units) if args.dedup else units
            np.add.at(counts, units, 1)
            file.write(unit_line(name, units) + "\n")
            file.flush()
    report_unusable(problems, len(paths))
    os.replace(partial, out)
    return counts, len(paths) - len(problems)


def units_of(module, clusters, path, waveform=None):
    """The units of a file, or of another waveform (1, n) for it, one per frame, an array (T,)."""
    parts = features_to_cluster(module, path, clusters.features, waveform)
    return torch.cat([assign(part, clusters.centers)[0] for part in parts]).numpy()


def keep_complete_lines(path, names, counts):
    """The names of the files whose units a partial output holds, after what a kill left is cut off.

    Adds their units to `counts`. Raises UserError if it holds others than `names`.
    """
    done, end = set(), 0
    with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            name, units = split_units(os.fsdecode(line))
            if name not in names:
                raise UserError(
                    f"{path}: has units of {first_few([name])}, which isn't asked for: name "
                    "another folder, or remove this file"
                )
            np.add.at(counts, np.array(units.split(","), dtype=np.int64), 1)
            done.add(name)
            end += len(line)
        file.truncate(end)
    return done


# ------------------------------------------------------------------------------ further formats


def write_km(out, paths, n_units, args):
    """HuBERT's files, beside the text."""
    lines = [split_units(line) for line in lines_of(out)]
    samples = [read_header(os.path.join(args.pathDB, paths[name])).samples for name, _ in lines]
    write_lines(out.with_suffix(".km"), (units.replace(",", " ") for _, units in lines))
    files = (f"{paths[name]}\t{n}" for (name, _), n in zip(lines, samples, strict=True))
    write_lines(out.with_suffix(".tsv"), [args.pathDB, *files])
    write_lines(out.with_name("dict.km.txt"), (f"{unit} 1" for unit in range(n_units)))


def write_onehot(out, paths, n_units, args):
    """One file of rows for each audio file."""
    for name, units in map(split_units, lines_of(out)):
        units = np.array(units.split(","), dtype=np.int64)
        save_array(out.parent / "onehot" / f"{name}.npy", one_hot(units, n_units))


WRITERS = {"km": write_km, "onehot-npy": write_onehot}


if __name__ == "__main__":
    main()
