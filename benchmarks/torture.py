"""Does training survive kills, stop signals, full disks and damaged files?

    python benchmarks/torture.py [kill stop disk corpora checkpoints leaks] [--seed 0] [--json FILE]

kill         kill -9 at random moments of a run, which the same command resumes: at the end,
             everything it has written equals what the undisturbed run wrote, bit for bit
stop         the same with SIGTERM, SIGINT and SIGUSR1, and their exit statuses
disk         a disk that is full for a while: no checkpoint is lost, and the run ends as usual
corpora      damaged corpora: one clear line and status 2, or a run with the right audio and labels
checkpoints  damaged checkpoints: one clear line and status 2, or a run; if bytes were damaged, one
             with the results of the undamaged file; no code in them is executed
leaks        memory, open files, threads and processes of a long run

One run in twenty is a separate process, the others are forked. Everything happens below one
temporary directory, which is removed unless there were findings; a finding can be repeated by its
number: `torture.py corpora --first 137 --corpora 1`.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ["OMP_NUM_THREADS"] = "1"  # forked processes inherit no threads

import utils.run.before_torch  # noqa: F401

from benchmarks.trials.damaged_files import checkpoints, corpora
from benchmarks.trials.interruptions import disk, kill, stop
from benchmarks.trials.runs import TINY, Part, Run, on, warm_up
from tests.common import write_tiny_corpus
from utils.files import save_json


def main(argv=None):
    args = parse_arguments(argv)
    place = Path(tempfile.mkdtemp(prefix="cpc-torture-"))
    warm_up(place)
    done = []
    for name in args.parts or PARTS:
        part = Part(name, place / name, args)
        PARTS[name](part)
        part.seconds = time.perf_counter() - part.start
        done.append(part)
    print_table(done)
    if args.json:
        save_json(args.json, {"flags": vars(args), "parts": [part.result() for part in done]})
    if any(part.findings for part in done):
        print(f"\nthe findings' files are in {place}")
        return 1
    shutil.rmtree(place)
    return 0


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--kills", type=int, default=200)
    add("--stops", type=int, default=50)
    add("--fills", type=int, default=20, help="times that the disk is filled")
    add("--corpora", type=int, default=500)
    add("--checkpoints", type=int, default=500)
    add("--epochs", type=int, default=300, help="of the run that is watched for leaks")
    add("--seed", type=int, default=0)
    add("--first", type=int, default=0, metavar="N", help="number of the first damaged file")
    add("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.parts) - PARTS.keys())
    if unknown:
        parser.error(f"no part {unknown[0]}; choose of {', '.join(PARTS)}")
    return args


def print_table(parts):
    print("| part | what was done | findings | minutes |\n|---|---|---|---|")
    for part in parts:
        what = ", ".join(f"{value} {name}" for name, value in part.counts.items())
        print(f"| `{part.name}` | {what} | {len(part.findings)} | {part.seconds / 60:.1f} |")
    for part in parts:
        for name, value in part.values.items():
            print(f"\n{part.name}, {name}: {value}", end="")
    print()


# ------------------------------------------------------------------------------------------- leaks


def leaks(part):
    """The resources of a long run after a tenth of its epochs, and at its end."""
    corpus, epochs = write_tiny_corpus(part.place / "corpus", seconds=(0.3, 0.6)), part.args.epochs
    words = [
        *on(corpus), *TINY, "--pathCheckpoint", part.place / "run", "--nEpoch", epochs,
        "--save_step", 10, "--max_size_loaded", 10_000, "--pathCaptureDS", corpus / "test.txt",
        "--captureEverything", "--captureEachEpochs", 20, "--pathCaptureSave",
        part.place / "captures", "--supervised_classif_metric", "--speaker_sep",
        "--linsep_n_epoch", 1, "--linsep_classif_each_epochs", 20, "--linsep_logs_dir",
        part.place / "probes",
    ]  # fmt: skip
    trial, held = Run(words, part.place / "log", forked=False), {}
    while not trial.wait(patience=0.2):
        epoch = trial.printed().count("validation accuracy by ")
        held[epoch] = holdings(trial.pid) or held.get(epoch)
        part.progress(epoch, epochs)
    if trial.finding():
        part.found(0, trial.finding())
    marks = [min(held, key=lambda epoch: abs(epoch - mark)) for mark in (epochs // 10, epochs - 1)]
    early, late = (held[mark] for mark in marks)
    part.values |= {f"after {mark} epochs": held[mark] for mark in marks}
    part.counts["epochs"] = epochs
    for name in early:
        if late[name] > early[name] + (20 if name == "MB" else 2):
            part.found(0, f"{name}: {early[name]}, later {late[name]}")


def holdings(pid):
    """The resources of a process: memory in MB, open files, threads, processes; None if gone."""
    process = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        return {
            "MB": int(status["VmRSS"].split()[0]) // 1024,
            "files": len(list((process / "fd").iterdir())),
            "threads": int(status["Threads"]),
            "processes": len((process / "task" / str(pid) / "children").read_text().split()),
        }
    except (OSError, KeyError):
        return None


PARTS = {f.__name__: f for f in (kill, stop, disk, corpora, checkpoints, leaks)}

if __name__ == "__main__":
    sys.exit(main())
