"""The ABX task compared with loops over pairs of items, and with the fastabx library if installed.

    python benchmarks/abx.py [--items 255 2000] [--threads 2] [--device cpu] [--json FILE]

The items are noise, 5 to 24 frames of 256 dimensions, by three speakers or more, of eight phones in
four contexts. The loop is the plain way to write DTW: in Python, pair by pair and cell by cell, on
tensors or on NumPy arrays. It is timed on some of the pairs that the task needs, and its time for
all of them, each compared once, is extrapolated. fastabx has a compiled DTW. Results are compared
first. Times are medians of alternating runs; rely on the ratios, since times depend on other load.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import numpy as np
import torch

from eval.abx_distances import Frames
from eval.abx_fastabx import fastabx_errors
from eval.abx_groups import across_cells, cell_errors, group_items, mean_error, within_cells
from eval.abx_items import Items
from eval.dtw import cosine_distance, dtw, normalize_with_singularity
from utils.files import save_json
from utils.run.machine import keep_freed_memory

PHONES, CONTEXTS, ITEMS_PER_SPEAKER, SIZES, DIM = 8, 4, 100, (5, 25), 256
MAX_SIZE_GROUP, MAX_X_ACROSS = 10, 5
LOOPS = {  # an empty table, and on how many pairs to time it
    "tensors": (lambda n, m: torch.full((n, m), torch.inf), 20),
    "NumPy": (lambda n, m: np.full((n, m), np.inf, dtype=np.float32), 200),
}
COLUMNS = ("items", "task", "pairs", *(f"{name}, s" for name in LOOPS), "ours, s", "fastabx, s")


def main(argv=None):
    args = parse_arguments(argv)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, device {args.device}")
    print("".join(f"{column:>12}" for column in (*COLUMNS, *(f"/ {name}" for name in LOOPS))))
    results = [row for n_items in args.items for row in measure(n_items, args)]
    if args.json:
        save_json(args.json, {"torch": torch.__version__, **vars(args), "results": results})


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, nargs="+", default=[255, 2000])
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(argv)


def measure(n_items, args):
    """Time the tasks within and across speakers; prints and yields a row of figures for each."""
    items, frames = make_items(n_items)
    groups = group_items(items, MAX_SIZE_GROUP, seed=0)
    per_pair = {name: time_of_loop(frames, *how) for name, how in LOOPS.items()}
    on_device = frames.to(args.device)
    ways = {"ours": cell_errors}
    if importlib.util.find_spec("fastabx"):
        ways["fastabx"] = fastabx_errors
    for task, cells in (
        ("within", within_cells(groups)),
        ("across", across_cells(groups, MAX_X_ACROSS, seed=0)),
    ):
        n_pairs = count_pairs(groups, cells)
        seconds = {name: n_pairs * time for name, time in per_pair.items()}
        seconds |= time_ways(ways, groups, cells, on_device, args.repeat)
        show(n_items, task, n_pairs, seconds)
        yield {"items": n_items, "task": task, "pairs": n_pairs, "seconds": seconds}


def show(n_items, task, n_pairs, seconds):
    figures = [seconds.get(name) for name in (*LOOPS, "ours", "fastabx")]
    ratios = [seconds[name] / seconds["ours"] for name in LOOPS]
    print(
        f"{n_items:12}{task:>12}{n_pairs:12}"
        + "".join(f"{figure:12.3f}" if figure else f"{'-':>12}" for figure in figures)
        + "".join(f"{ratio:12.0f}" for ratio in ratios)
    )


def make_items(n_items):
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randint(0, n, (n_items,), generator=generator)

    speakers = max(3, n_items // ITEMS_PER_SPEAKER)
    times = torch.zeros(n_items, dtype=torch.float64)
    items = Items(("file",) * n_items, times, times, draw(PHONES), draw(CONTEXTS), draw(speakers))
    sizes = SIZES[0] + draw(SIZES[1] - SIZES[0])
    frames = torch.randn(int(sizes.sum()), DIM, generator=generator)
    return items, Frames(normalize_with_singularity(frames), sizes.cumsum(0) - sizes, sizes)


def count_pairs(groups, cells):
    """Pairs of items that the cells need, each counted once."""
    a, b, x = cells.unbind(1)
    pairs = torch.unique(torch.cat([torch.stack([x, a], 1), torch.stack([x, b], 1)]), dim=0)
    rows, columns = groups.sizes[pairs].unbind(1)
    itself = pairs[:, 0] == pairs[:, 1]
    return int(torch.where(itself, rows * (rows - 1) // 2, rows * columns).sum())


def time_ways(ways, groups, cells, frames, repeat):
    """Median seconds of each way, run in turn; their scores must be the same."""
    seconds = {name: [] for name in ways}
    for run in range(repeat + 1):
        scores = []
        for name, errors_of in ways.items():
            start = time.perf_counter()
            scores.append(mean_error(groups, cells, errors_of(groups, cells, frames, "cosine")))
            seconds[name].append(time.perf_counter() - start)
        if run == 0:  # warms up, too
            assert max(scores) - min(scores) < 1e-5, scores
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def time_of_loop(frames, make_table, n_pairs):
    """Seconds per pair of a loop over the cells of a table."""
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randint(0, len(frames.sizes), (n_pairs, 2), generator=generator)
    pieces = [frames.frames[s : s + n] for s, n in zip(frames.starts, frames.sizes, strict=True)]
    start, distances = time.perf_counter(), []
    for x, y in pairs:
        between = cosine_distance(pieces[x], pieces[y])
        cost = make_table(len(pieces[x]) + 1, len(pieces[y]) + 1)
        distances.append(
            looped_dtw(between.numpy() if isinstance(cost, np.ndarray) else between, cost)
        )
    seconds = time.perf_counter() - start
    x, y = pairs[0]
    between = cosine_distance(pieces[x], pieces[y])[None]
    assert abs(dtw(between, frames.sizes[x, None], frames.sizes[y, None]) - distances[0]) < 1e-6
    return seconds / n_pairs


def looped_dtw(distances, cost):
    """DTW of one pair, cell by cell, with its path traced back for the length."""
    n, m = distances.shape
    cost[0, 0] = 0
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            before = min(cost[i - 1, j - 1], cost[i, j - 1], cost[i - 1, j])
            cost[i, j] = distances[i - 1, j - 1] + before
    i, j, length = n, m, 0
    while i or j:
        steps = ((i - 1, j - 1), (i, j - 1), (i - 1, j))
        i, j = min(steps, key=lambda step: cost[step])
        length += 1
    return cost[n, m] / length


if __name__ == "__main__":
    main()
