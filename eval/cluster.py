"""k-means on the features of a model: the centers of discrete units.

    python eval/cluster.py CHECKPOINT.pt OUT DB -k 50
    python eval/cluster.py RUN OUT.pt DB -k 100 --encoder_layer --norm_vec_len

OUT is a folder, for `checkpoint_last.pt` and `args.json`, or a file OUT.pt or OUT.npy, with
OUT_args.json beside it. The centers are those of a random subset of the files, spread over
speakers; each file goes through the model by itself, as a whole. The model, the layer and the
normalisation are stored with them, so that `eval/quantize.py` can't compute other features.
"""

import itertools
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch

from eval.units import (
    FEATURES,
    LAST,
    args_path,
    feature_module,
    features_to_cluster,
    report_unusable,
    scaled,
    write_clusters,
)
from utils.data.corpus import listed_utterances, scan_corpus
from utils.files import writing_to
from utils.kmeans import kmeans
from utils.misc import SAMPLES_PER_FRAME, UserError, counted, generator_from, in_turns, percent
from utils.run.checkpoint import open_checkpoint
from utils.run.command import CommandLine, at_least, command
from utils.run.console import progress
from utils.run.machine import device_from, prepare_device
from utils.run.shared_flags import add_device, add_extension, add_level

FRAMES_PER_CLUSTER, FEWEST_FRAMES = 2000, 200_000  # more hardly move the centers
LARGE_SHARE = 0.5  # of all frames in one unit: something is wrong


@command
def main(argv=None):
    args = parse_arguments(argv)
    device = prepare_device(args.device)
    corpus = scan_corpus(args.pathDB, args.file_extension, args.speaker_level, args.ignore_cache)
    args.file_extension = corpus.extension
    files = listed_utterances(corpus, args.seqList)
    report_unusable([f"{u.path}: {u.problem}" for u in files if u.problem], len(files))
    files = spread_over_speakers(files, SAMPLES_PER_FRAME * args.max_frames, args.seed)
    features, start = FEATURES | vars(args), time.monotonic()
    features = {name: features[name] for name in FEATURES}
    frames = collect(feature_module(features, device), corpus, files, args, features).to(device)
    if args.standardise:
        features["mean_std"] = mean_and_std(frames)
        frames = scaled(frames, features)
    computed = time.monotonic()
    options = {"max_iterations": args.MAX_ITER, "spherical": args.norm_vec_len}
    result = kmeans(frames, args.nClusters, generator_from(args.seed, "k-means"), **options)
    share = (result.counts.max() / result.counts.sum()).item()
    figures = {
        "frames": len(frames),
        "inertia": result.inertia,
        "inertia_of_one_cluster": frames.var(0, correction=0).sum().item(),
        "iterations": result.n_iterations,
        "largest_share": share,
        "seconds_features": computed - start,
        "seconds_kmeans": time.monotonic() - computed,
    }
    with writing_to(args.out):
        os.makedirs(os.path.dirname(args.out), exist_ok=True)
        write_clusters(args.out, result.centers.cpu(), features, {**vars(args), **figures})
    print(
        "{frames:,} frames: inertia {inertia:.5g} per frame (of one cluster: "
        "{inertia_of_one_cluster:.5g}) after {iterations} iterations; features "
        "{seconds_features:.1f} s, k-means {seconds_kmeans:.1f} s".format(**figures)
    )
    print(f"{counted(args.nClusters, 'cluster')}, the largest of {percent(share)}: {args.out}")
    warn_of_large_unit(share)


def warn_of_large_unit(share):
    if share > LARGE_SHARE:
        print(
            f"warning: one unit has {percent(share)} of all frames: is most of the audio silence, "
            "or the model untrained, or --norm_vec_len or --seq_norm needed?"
        )


# ---------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    """The arguments, checked and completed. Raises UserError for those that can't work."""
    args = build_parser().parse_args(argv)
    args.pathCheckpoint = os.path.abspath(open_checkpoint(args.pathCheckpoint).path)
    args.out = os.path.abspath(args.out)
    if not args.out.endswith((".pt", ".npy")):
        args.out = os.path.join(args.out, LAST)
    for path in (args.out, args_path(args.out)):
        if os.path.exists(path):
            raise UserError(f"{path}: exists already: name another OUT, or remove it")
    wanted = max(FEWEST_FRAMES, FRAMES_PER_CLUSTER * args.nClusters)
    args.max_frames = args.max_frames or wanted
    if args.standardise and args.norm_vec_len:
        raise UserError("--standardise and --norm_vec_len: choose one")
    device_from(args.device)
    return args


# A flag on two lines reads better than on seven, hence:
# fmt: off


def build_parser():
    parser = CommandLine(prog="cluster.py", description=__doc__)
    add = parser.add_argument
    add("pathCheckpoint", help="checkpoint, or a run's directory for the newest in it")
    add("out", help="new folder, or a .pt or .npy file, for the centers")
    add("pathDB", help="folder of the audio files; its first subfolders are the speakers")
    add_extension(add)
    add("--speaker_level", type=at_least(0), default=1, metavar="N",
        help="folders of a path that name the speaker")
    add("--seqList", metavar="FILE", help="use only these files, one name per line")
    add("--ignore_cache", action="store_true", help="list the audio files again")
    add = parser.add_argument_group("features").add_argument
    add_feature_flags(add)
    add("--standardise", action="store_true",
        help="scale each dimension to zero mean and unit variance over all frames")
    add = parser.add_argument_group("k-means").add_argument
    add("-k", "--nClusters", type=at_least(1), default=50, metavar="K", help="clusters")
    add("-n", "--MAX_ITER", type=at_least(1), default=300, metavar="N", help="most iterations")
    add("--max_frames", type=at_least(1), metavar="N",
        help=f"frames to cluster (default: {FRAMES_PER_CLUSTER} per cluster, at least "
        f"{FEWEST_FRAMES})")
    add("--seed", type=int, default=0, help="of the choice of files and of the first centers")
    add_device(add)
    return parser


def add_feature_flags(add, default=False):
    """Flags that say which features are clustered; `default` of the switches."""
    add("--encoder_layer", action="store_true", default=default,
        help="encoded frames instead of contexts")
    add_level(add, default="frames" if default is False else None)
    add("--level_gru", type=at_least(1), metavar="N",
        help="contexts of the N-th recurrent layer instead of the last")
    add("--seq_norm", action="store_true", default=default,
        help="normalise each file to zero mean and unit variance over time")
    add("--norm_vec_len", action="store_true", default=default,
        help="scale frames (and centers) to unit length: clusters by direction")


# fmt: on
# ----------------------------------------------------------------------------------- features


def spread_over_speakers(utterances, n_samples, seed):
    """Random utterances of all speakers in turn, `n_samples` in all or a little more."""
    usable = [u for u in utterances if not u.problem and u.samples >= SAMPLES_PER_FRAME]
    order = torch.randperm(len(usable), generator=generator_from(seed, "files to cluster"))
    order = order[in_turns(torch.tensor([u.speaker for u in usable], dtype=torch.long)[order])]
    chosen = [usable[i] for i in order.tolist()]
    totals = itertools.accumulate((u.samples for u in chosen), initial=0)
    return [u for u, before in zip(chosen, totals, strict=False) if before < n_samples]


def mean_and_std(frames):
    """Of each dimension of frames (N, D), two lists; the deviation of a constant one is 1."""
    std, mean = torch.std_mean(frames.double(), dim=0, correction=0)
    return [mean.tolist(), torch.where(std > 0, std, 1).tolist()]


def collect(module, corpus, files, args, features):
    """The first `max_frames` frames, (N, D), of these files; unusable ones are left out.

    Raises UserError if these are more than training tolerates.
    """
    n_frames = min(args.max_frames, sum(u.samples // SAMPLES_PER_FRAME for u in files))
    if n_frames < args.nClusters:
        raise UserError(
            f"-k {args.nClusters}: {args.pathDB} has only {counted(n_frames, 'usable frame')}"
            if n_frames < args.max_frames
            else f"-k {args.nClusters}: more than --max_frames {args.max_frames}"
        )
    frames, filled, problems = torch.empty(n_frames, module.dim_output), 0, []
    for file in progress(files, what="features", unit=" files"):
        try:
            path = os.path.join(corpus.root, file.path)
            for part in features_to_cluster(module, path, features):
                part = part[: n_frames - filled]
                frames[filled : filled + len(part)] = part
                filled += len(part)
        except UserError as error:
            problems.append(str(error))
    report_unusable(problems, len(files))
    return frames[:filled]


if __name__ == "__main__":
    main()
