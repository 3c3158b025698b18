"""Waits of the training loop: for the plan of an epoch, and for packs that processes share.

    python benchmarks/stalls.py [--hours 960 60000] [--gigabytes 1] [--batch 32]

Plans are made for an invented listing of files of 2 to 22 s by speakers with 25 minutes (up to
1,000 hours) or 8 hours each. Two processes fill a pack, either in new shared memory each time or,
as in training, in one of two buffers in turn. Times are wall-clock times of a single try: another
process on the machine spoils them.
"""

import argparse
import os
import sys
import time
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import numpy as np
import torch

from dataset import MAX_SIZE_LOADED, BatchLoader
from utils.data.packs import TwoBuffers
from utils.data.windows import Layout, plan_pack
from utils.misc import SAMPLE_RATE
from utils.run.command import command
from utils.run.distributed import joined_world
from utils.run.launch import launch
from utils.run.stopping import StopSignals

WINDOW, MEAN_SECONDS, N_FILLS = 20_480, 12, 5


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, nargs="*", default=[960, 60_000])
    parser.add_argument("--gigabytes", type=float, default=1, help="of audio in a shared pack")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args(argv)
    for hours in args.hours:
        measure_plans(invented_listing(hours), args.batch)
    return launch(2, measure_fills, [str(args.gigabytes)])


def invented_listing(hours):
    """The part of an AudioDataset that planning needs."""
    rng, n_files = np.random.default_rng(0), int(hours * 3600 / MEAN_SECONDS)
    n_speakers = max(1, int(hours / (0.41 if hours <= 1000 else 8)))
    return SimpleNamespace(
        title=f"{hours:,.0f} h",
        samples=(rng.uniform(2, 2 * MEAN_SECONDS - 2, n_files) * SAMPLE_RATE).astype(np.int64),
        speakers=np.sort(rng.integers(0, n_speakers, n_files)),
        size_window=WINDOW,
        max_size_loaded=MAX_SIZE_LOADED,
        require_windows=lambda n_windows: None,
    )


def measure_plans(listing, batch_size):
    before, start = resident(), time.perf_counter()
    loader = BatchLoader(listing, batch_size, "samespeaker", seed=0, training=True)
    n_batches, seconds = loader.n_batches(0), time.perf_counter() - start
    print(f"{listing.title}, {len(listing.samples):,} files, {len(loader._packs)} packs")
    print(f"  batches counted at the start: {n_batches:,} in {seconds:.2f} s")
    print(f"  memory that stays: {resident() - before:.0f} MB")
    files = loader._packs[0]
    start = time.perf_counter()
    plan = loader._planner(plan_pack, 0, 0)(Layout.of(files, listing.samples))
    seconds, full = time.perf_counter() - start, np.diff(plan.edges) == batch_size
    print(f"  a pack planned in {seconds:.2f} s")
    print(
        f"  of {len(np.unique(listing.speakers[files]))} speakers, {full.mean():.1%} full batches"
    )


def resident():
    """Memory of this process in MB."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@command
def measure_fills(words):
    """Fill packs in new memory and in two buffers, as one of several processes."""
    size = int(float(words[0]) * 1e9 / 2)
    data = SimpleNamespace(
        samples=np.full(100, size // 100), max_size_loaded=size // 100 * 100, dtype=torch.int16
    )
    with StopSignals() as stop, joined_world(stop, torch.device("cpu")) as world:
        part = slice(world.rank * size // world.size, (world.rank + 1) * size // world.size)
        buffers = TwoBuffers()
        ways = {
            "new memory": lambda: world.shared_tensor(size, torch.int16),
            "two buffers": lambda: buffers.allocate(data, world),
        }
        for name, allocate in ways.items():
            times = [fill(allocate, part, world) for _ in range(N_FILLS)]
            for what, seconds in zip(
                ("all wait", "filled in"), zip(*times, strict=True), strict=True
            ):
                print(f"{name}, {what}, s: {' '.join(f'{s:.2f}' for s in seconds)}", flush=True)


def fill(allocate, part, world):
    """Seconds to allocate memory and to write this process's part of it."""
    world.all_gather(None)
    start = time.perf_counter()
    audio = allocate()
    allocated = time.perf_counter()
    audio[part] = 1
    world.all_gather(None)
    return allocated - start, time.perf_counter() - allocated


if __name__ == "__main__":
    sys.exit(main())
