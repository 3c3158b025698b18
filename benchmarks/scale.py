"""Training speed by number of processes, measured here and calculated for other machines.

    python benchmarks/scale.py [--processes 2] [--threads 2] [--configuration cpcctc-linear]
    python benchmarks/scale.py --simulate [--step_ms 95 --allreduce_gb_per_s 80 ...]

The first form trains with one process and with several, which share the threads (or have a GPU
each), and measures how long averaging the gradients takes on its own. The second predicts how long
an epoch of a corpus takes on 1 to 64 processes, eight on each machine, from five costs: those of a
step, of the gradients' size and transport, and of decoding. Costs that aren't given are measured
here.

Assumptions of the calculation: gradients are averaged during the backward pass, two thirds of a
step, except for the last 25 MB; each machine decodes the whole corpus once an epoch, in the
background (the very first pack, before the first step, isn't counted).
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch
import torch.distributed as dist

from benchmarks.data import in_new_process, measure_decoding, write_corpus
from benchmarks.train_step import CONFIGURATIONS, all_batches, build_training
from dataset import MAX_SIZE_LOADED
from utils.files import load_json, save_json
from utils.misc import SAMPLE_RATE
from utils.run.distributed import joined_world
from utils.run.launch import launch
from utils.run.machine import device_from, n_processors
from utils.run.stopping import StopSignals

N_FILES = 100  # of 12 s
BUCKET_MB = 25  # of gradients that DistributedDataParallel sends at a time
PER_MACHINE = 8
CORPORA = (100, 1_000, 60_000)  # hours: a part of LibriSpeech, all of it, Libri-light
PROCESSES = (1, 2, 4, 8, 16, 32, 64)


def main(argv=None):
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="cpc-benchmark-") as root:
        write_corpus(os.path.join(root, "audio"), N_FILES)
        results = simulate(measured_costs(args, root)) if args.simulate else measure(args, root)
    if args.json:
        save_json(args.json, results)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--configuration", default="cpcctc-linear", choices=list(CONFIGURATIONS))
    add("--processes", type=int, default=2, metavar="N", help="to compare with one")
    add("--threads", type=int, default=n_processors(), help="of all processes together")
    add("--steps", type=int, default=10, help="timed steps")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    add("--simulate", action="store_true", help="calculate for other corpora and machines")
    add("--step_ms", type=float, help="of a step of one process")
    add("--windows_per_step", type=float, help="of one process, 1.28 s each")
    add("--gradient_mb", type=float, help="size of the gradients")
    add("--allreduce_gb_per_s", type=float, help="at which gradients are averaged")
    add("--decode_x", type=float, help="times real time at which a thread decodes")
    add("--decode_threads", type=int, default=2, help="for each process")
    add("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------- measured here


def measure(args, root):
    """Print and return the figures of one process and of several."""
    device = device_from(args.device).type
    share = max(1, args.threads // args.processes)
    runs = [(1, share), (args.processes, share)]
    if device == "cpu" and share < args.threads:
        runs.insert(0, (1, args.threads))
    rows = [trained(args, root, *run) for run in runs]
    base = rows[-2]["windows_per_s"]
    print(f"torch {torch.__version__}, {device}, {args.configuration}, gradients of ", end="")
    print(f"{rows[-1]['gradient_mb']:.1f} MB")
    print(f"{'processes':>10}{'threads each':>14}{'step, ms':>10}{'windows/s':>11}", end="")
    print(f"{'of ideal':>10}{'averaging alone, ms':>21}")
    for row in rows:
        ideal = row["windows_per_s"] / (base * row["processes"])
        row["of_ideal"] = ideal if row["threads"] == share else None
        shown = "" if row["of_ideal"] is None else f"{100 * ideal:.0f} %"
        print(f"{row['processes']:>10}{row['threads']:>14}{row['step_ms']:>10.1f}", end="")
        print(f"{row['windows_per_s']:>11.1f}{shown:>10}{row['allreduce_ms']:>21.1f}")
    return rows


def trained(args, root, processes, threads):
    """Figures of training with a number of processes."""
    result = os.path.join(root, "result.json")
    words = [args.configuration, root, result, args.device, args.precision, threads, args.steps]
    status = launch(processes, train, [str(word) for word in words])
    if status:
        sys.exit(status)
    return load_json(result)


def train(words):
    """The work of each process; the first one writes the figures."""
    name, root, result, device, precision, threads, steps = words
    options = argparse.Namespace(
        device=device, precision=precision, threads=int(threads), compile=False
    )
    with StopSignals() as stop, joined_world(stop, device_from(device)) as world:
        training = build_training(name, os.path.join(root, "audio"), options, world)
        state, batches = training.state, all_batches(training)
        state.networks.train()
        windows, step_ms = time_steps(training, batches, int(steps))
        gradient_mb = sum(p.numel() for p in state.networks.parameters()) * 4 / 1e6
        figures = {
            "processes": world.size,
            "threads": torch.get_num_threads(),
            "step_ms": step_ms,
            "windows_per_step": windows,
            "windows_per_s": 1000 * world.size * windows / step_ms,
            "gradient_mb": gradient_mb,
            "allreduce_ms": time_averaging(gradient_mb, state.device) if world.size > 1 else 0.0,
        }
        if world.is_rank_zero:
            save_json(result, figures)


def time_steps(training, batches, n_steps):
    """(windows in a batch, milliseconds a step), after three steps to warm up."""
    for _ in range(3):
        position, batch = next(batches)
        training.step(position, batch)
    training.state.world.all_gather(None)  # all begin together
    start = time.perf_counter()
    for _ in range(n_steps):
        position, batch = next(batches)
        training.step(position, batch)
    training.state.check_finite()  # waits for the device
    return len(batch.window), 1000 * (time.perf_counter() - start) / n_steps


def time_averaging(size_mb, device, repeat=5):
    """Milliseconds to sum this many numbers over all processes, the best of several tries."""
    numbers, times = torch.ones(int(size_mb * 1e6 / 4), device=device), []
    for _ in range(repeat):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(numbers)
        numbers[0].item()  # waits for the device
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


# --------------------------------------------------------------------------- calculated from that


@dataclass
class Costs:
    """The costs that a run's speed is calculated from."""

    step_ms: float
    windows_per_step: float  # of one process, 1.28 s each
    gradient_mb: float
    allreduce_gb_per_s: float
    decode_x: float  # times real time, one thread
    decode_threads: int  # of each process


def measured_costs(args, root):
    """Those given on the command line, the others measured here."""
    costs = {name: getattr(args, name) for name in Costs.__dataclass_fields__}
    if None in (args.step_ms, args.windows_per_step, args.gradient_mb):
        alone = trained(args, root, 1, args.threads)
        costs |= {
            name: alone[name] for name, value in costs.items() if value is None and name in alone
        }
    if args.allreduce_gb_per_s is None:
        several = trained(args, root, args.processes, max(1, args.threads // args.processes))
        moved = ring_share(args.processes) * several["gradient_mb"]
        costs["allreduce_gb_per_s"] = moved / several["allreduce_ms"]
    if args.decode_x is None:
        found = in_new_process(measure_decoding, os.path.join(root, "audio"), 1)
        costs["decode_x"] = found["decoding, x real time, 1 threads"]
    return Costs(**costs)


def ring_share(n_processes):
    """Amount that each process sends and receives in a ring, relative to the gradients' size."""
    return 2 * (n_processes - 1) / n_processes


def epoch(hours, n_processes, costs):
    """(seconds of any epoch but the first, fraction of them spent waiting for data)"""
    step = costs.step_ms / 1000
    seconds_per_mb = ring_share(n_processes) / (1000 * costs.allreduce_gb_per_s)
    averaging = seconds_per_mb * costs.gradient_mb
    last = seconds_per_mb * min(BUCKET_MB, costs.gradient_mb)
    step += max(averaging - 2 / 3 * step, last)
    audio = 3600 * hours
    n_steps = audio / 1.28 / (costs.windows_per_step * n_processes)
    decoders = min(n_processes, PER_MACHINE) * costs.decode_threads
    training, decoding = n_steps * step, audio / (decoders * costs.decode_x)
    kept = audio * SAMPLE_RATE <= MAX_SIZE_LOADED  # decoded once for all epochs
    total = training if kept else max(training, decoding)
    return total, 1 - training / total


def simulate(costs):
    """Print and return how long an epoch takes."""
    for name, value in vars(costs).items():
        print(f"{name:<20}{value:>12.4g}")
    print("\nhours:minutes:seconds that an epoch takes, and the share of it that waits for data")
    print(f"{'processes':>10}" + "".join(f"{f'{hours:,} h of audio':>24}" for hours in CORPORA))
    rows = []
    for n_processes in PROCESSES:
        found = [epoch(hours, n_processes, costs) for hours in CORPORA]
        rows.append({"processes": n_processes, "epochs": dict(zip(CORPORA, found, strict=True))})
        cells = [f"{hours_minutes(seconds)}, {100 * wait:.1f} %" for seconds, wait in found]
        print(f"{n_processes:>10}" + "".join(f"{cell:>24}" for cell in cells))
    return {"costs": vars(costs), "rows": rows}


def hours_minutes(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60:,}:{minutes % 60:02}:{seconds:02}"


if __name__ == "__main__":
    main()
