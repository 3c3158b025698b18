"""The histogram of `reprDiff` compared with Python loops: time for one batch.

    python benchmarks/stats.py [--batch 16] [--repeat 5] [--threads 2] [--json FILE]

loop over frames     each distance is computed and put into its bin, one after the other
loop over distances  all distances are computed at once, as in ReprDiffStat, then put into their
                     bins one after the other

Results are compared first. Times are medians of runs of all three in turn: rely on the ratios. The
stat adds this time to each batch of a capture, and that of a picture to each capture.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch

from stats.distances import METRICS, frame_distances
from stats.repr_diff_stat import ReprDiffStat
from utils.files import save_json
from utils.run.machine import keep_freed_memory

N_FRAMES, DIM = 128, 256
CALLS = 50  # of ReprDiffStat, for one of a loop
STEPS = {"cosine": 0.05, "euclid": 0.5, "euclidsq": 10.0, "coscorr": 0.05}
DEFINITIONS = {
    "cosine": lambda u, v: 1 - torch.dot(u, v) / (u.norm() * v.norm()),
    "coscorr": lambda u, v: (torch.dot(u, v) / (u.norm() * v.norm())).abs(),
    "euclidsq": lambda u, v: (u - v).square().sum(),
    "euclid": lambda u, v: (u - v).norm(),
}


def main(argv=None):
    args = parse_arguments(argv)
    keep_freed_memory()  # as in training
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(args.batch, N_FRAMES, DIM, generator=generator)
    frames = 0.6 * frames + 0.4 * frames.roll(1, dims=1)  # neighbours are somewhat alike
    print(f"torch {torch.__version__}, {args.threads} threads, {args.batch} windows of {N_FRAMES}")
    print(f"{'metric':10}{'ReprDiffStat':>15}{'loop over distances':>29}{'loop over frames':>29}")
    results = {metric: compare(metric, frames, args.repeat) for metric in METRICS}
    results["picture, ms"] = time_picture(frames, args.repeat)
    print(f"a picture takes {results['picture, ms']:.0f} ms")
    if args.json:
        save_json(args.json, {"torch": torch.__version__, **vars(args), "results": results})


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=16, help="windows in a batch")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(argv)


def compare(metric, frames, repeat):
    """Milliseconds of each way; prints a line of the table."""
    step = STEPS[metric]
    stat = ReprDiffStat(metric, "ctx_repr", step, ".")
    ways = {
        "ReprDiffStat": lambda: stat.computeForBatch({"ctx_repr": frames})["hist"],
        "loop over distances": lambda: loop_over_distances(frames, metric, step),
        "loop over frames": lambda: loop_over_frames(frames, metric, step),
    }
    reference, *others = (Counter(way()) for way in ways.values())
    for other in others:  # rounding may move a distance on the edge of a bin
        moved = (reference - other).total()
        assert reference.total() == other.total()
        assert moved <= 3, (metric, reference, other)
    milliseconds = dict(zip(ways, time_in_turn(ways.values(), (CALLS, 1, 1), repeat), strict=True))
    fast, *slow = milliseconds.values()
    columns = "".join(f"{ms:15.1f} ms{ms / fast:9.0f}x " for ms in slow)
    print(f"{metric:10}{fast:12.3f} ms{columns}", flush=True)
    return milliseconds


def time_in_turn(ways, calls, repeat):
    """Median milliseconds of each way, run in turn so that other load affects all of them.

    calls: how often each is called in its turn, since a single short call can't be timed
    """
    times = [[] for _ in ways]
    for _ in range(repeat):
        for way, n_calls, found in zip(ways, calls, times, strict=True):
            start = time.perf_counter()
            for _ in range(n_calls):
                way()
            found.append(1000 * (time.perf_counter() - start) / n_calls)
    return [statistics.median(found) for found in times]


def loop_over_distances(frames, metric, step):
    hist = {}
    for distance in frame_distances(frames, metric).flatten() / step:
        if not torch.isnan(distance):
            key = math.floor(distance.item()) * step
            hist[key] = hist.get(key, 0) + 1
    return hist


def loop_over_frames(frames, metric, step):
    hist, distance_of = {}, DEFINITIONS[metric]
    for window in frames:
        for frame, before in zip(window[1:], window, strict=False):
            distance = distance_of(frame, before).item()
            if not math.isnan(distance):
                key = math.floor(distance / step) * step
                hist[key] = hist.get(key, 0) + 1
    return hist


def time_picture(frames, repeat):
    with tempfile.TemporaryDirectory(prefix="cpc-benchmark-") as directory:
        stat = ReprDiffStat("cosine", "ctx_repr", 0.05, directory)
        value = stat.computeForBatch({"ctx_repr": frames})
        return time_in_turn([lambda: stat.logStat(value, 0)], [1], repeat)[0]


if __name__ == "__main__":
    main()
