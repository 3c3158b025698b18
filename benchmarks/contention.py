"""A training step while another program uses a processor, for several ways in which threads wait.

    python benchmarks/contention.py [--configurations demo] [--threads 2] [--json FILE]
    python benchmarks/contention.py --spin_counts 300,1000,3000      # to choose between them

Each way of waiting has its own process; they take turns, so that other load on the machine affects
all of them. Figures are medians over steps of train_step.py's configurations, in milliseconds:
first undisturbed, then while a process that this one starts keeps a processor busy.

active: OpenMP's threads spin for milliseconds, as libgomp's do by default; passive: they sleep at
once; chosen: as this program's commands set it (utils/run/before_torch.py). `others` is the
fraction of all processors used by programs outside the measurement, the median over turns: if it
isn't about 0, repeat.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401
from utils.run.before_torch import CHOICES, SETTINGS

import torch

from benchmarks.data import write_corpus
from benchmarks.train_step import (
    N_FILES,
    Stopwatch,
    all_batches,
    build_training,
    configuration_names,
    timed_step,
)
from utils.files import save_json
from utils.run.distributed import World
from utils.run.machine import n_processors
from utils.run.stopping import StopSignals

WAYS = {  # name -> the variables of OpenMP that it sets
    "active": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "chosen": SETTINGS,
    "one thread": SETTINGS,
}
BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""
PER_SECOND = os.sysconf("SC_CLK_TCK")  # the unit of processor time in /proc


def main(argv=None):
    args = parse_arguments(argv)
    ways = WAYS | {f"spin {n}": SETTINGS | {"GOMP_SPINCOUNT": n} for n in args.spin_counts}
    print(f"torch {torch.__version__}, {args.threads} threads, {n_processors()} processors")
    print(f"{'':24}" + "".join(f"{way:>12}" for way in ways) + f"{'others':>9}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="cpc-benchmark-") as root:
        write_corpus(root, N_FILES)
        for name in args.configurations:
            with contextlib.ExitStack() as stack:
                workers = {
                    way: stack.enter_context(Worker(variables, name, root, threads(way, args)))
                    for way, variables in ways.items()
                }
                rows += [measure(name, workers, args, n_busy) for n_busy in (0, args.busy)]
    if args.json:
        save_json(args.json, {**vars(args), "torch": torch.__version__, "rows": rows})


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--configurations",
        type=configuration_names,
        default=["demo", "cpcctc-linear"],
        metavar="NAME,NAME",
        help="of train_step.py (default: demo,cpcctc-linear; this one's hidden size is 256)",
    )
    parser.add_argument("--rounds", type=int, default=6, help="turns of each process")
    parser.add_argument(
        "--steps", type=int, default=5, help="in each turn, after one that warms up"
    )
    parser.add_argument("--threads", type=int, default=n_processors(), help="of a step")
    parser.add_argument("--busy", type=int, default=1, help="processors that are taken")
    parser.add_argument(
        "--spin_counts",
        type=lambda text: text.split(","),
        default=[],
        metavar="N,N",
        help="more ways: spin N times, then sleep",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(argv)


def threads(way, args):
    return 1 if way == "one thread" else args.threads


def measure(name, workers, args, n_busy):
    """Print and return the medians of a configuration, calm or with busy processes."""
    steps, others = {way: [] for way in workers}, []
    with busy_processes(n_busy) as busy:
        for _ in range(args.rounds):
            for way, worker in workers.items():
                before, start = outside((worker.pid, *busy)), time.perf_counter()
                steps[way] += worker.do_steps(args.steps)
                spent = outside((worker.pid, *busy)) - before
                others.append(spent / (time.perf_counter() - start) / os.cpu_count())
    medians = {way: statistics.median(times) for way, times in steps.items()}
    title, share = (
        f"{name}, {n_busy} busy" if n_busy else f"{name}, calm",
        statistics.median(others),
    )
    print(f"{title:24}" + "".join(f"{ms:12.1f}" for ms in medians.values()), end="")
    print(f"{100 * share:7.0f} %", flush=True)
    return {"configuration": name, "busy": n_busy, "ms": medians, "others": share, "steps": steps}


@contextlib.contextmanager
def busy_processes(n):
    """A block in which `n` processes keep processors busy; yields their ids."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n)]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def outside(pids):
    """Seconds that all processors have spent on programs other than these since booting."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system = map(int, file.readline().split()[1:4])
    inside = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            inside += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    return (user + nice + system - inside) / PER_SECOND


class Worker:
    """A process that trains on request; a context manager, which ends the process."""

    def __init__(self, variables, *work):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_train, args=(other, *work), daemon=True)
        before = dict(os.environ)
        for variable in CHOICES:
            os.environ.pop(variable, None)
        os.environ |= variables
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ |= before
        self.pid = self.process.pid
        self.connection.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()

    def do_steps(self, n):
        """Milliseconds of each of `n` steps."""
        self.connection.send(n)
        return self.connection.recv()


def _train(connection, name, root, n_threads):
    options = argparse.Namespace(device="cpu", precision="fp32", compile=False, threads=n_threads)
    training = build_training(name, root, options, World(stop=StopSignals()))
    training.loader.dataset.only_pack()  # decoding isn't part of a step
    training.state.networks.train()
    batches, watch = all_batches(training), Stopwatch(training.state.device)

    def step_ms():
        times, _ = timed_step(training, batches, watch)
        return sum(times.values())

    step_ms()
    connection.send("ready")
    while True:
        n_steps = connection.recv()
        step_ms()
        connection.send([step_ms() for _ in range(n_steps)])


if __name__ == "__main__":
    main()
