"""Does training in another precision learn as much? Runs on the demo corpus, over some seeds.

    python benchmarks/precision.py [--precisions fp32,bf16] [--seeds 3] [--epochs 6] [--json FILE]

Synthesises the demo corpus, and trains on it as `make demo` does, in each precision with the seeds
1, 2, ... It compares loss and accuracy on the validation set after the last epoch, and the
accuracies of the linear probes there. Each figure is the mean over seeds, with the standard
deviation of a run. The last column is the difference between the means of a precision and those of
the first, in standard errors of that difference: within two, it is no more than chance. `--compile`
is passed on.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

from tests.common import ROOT
from utils.corpus import make_demo
from utils.files import load_json, save_json
from utils.run.console import progress

MODEL = (
    "--nPredicts 8 --CPCCTC --CPCCTCNumMatched 12 --CPCCTCSelfLoop --CPCCTCSkipBeg 1 "
    "--CPCCTCSkipEnd 2 --rnnMode linear --hiddenEncoder 64 --hiddenGar 96 --arMode GRU "
    "--sizeWindow 10240 --learningRate 2e-3"
).split()
PROBES = (
    "--supervised_classif_metric --speaker_sep --linsep_lr 1e-2 --linsepBatchSizeGPU 32".split()
)
FIGURES = ("validation loss", "accuracy, %", "phone probe, %", "speaker probe, %", "seconds")


def main(argv=None):
    args = parse_arguments(argv)
    results = {precision: [] for precision in args.precisions}
    with tempfile.TemporaryDirectory(prefix="cpc-precision-") as root:
        make_demo.main([f"{root}/corpus", "--speakers", str(args.speakers)])
        runs = [(seed, precision) for seed in range(1, args.seeds + 1) for precision in results]
        for seed, precision in progress(runs, what="training", unit=" runs"):
            results[precision].append(trained(root, precision, seed, args))
    print_table(results, args)
    if args.json:
        save_json(args.json, results)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--precisions", type=lambda text: text.split(","), default=["fp32", "bf16"])
    add("--seeds", type=int, default=3, help="runs in each precision")
    add("--epochs", type=int, default=6)
    add("--speakers", type=int, default=20, help="of the corpus")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--compile", action="store_true")
    add("--json", metavar="FILE", help="write the figures of all runs there")
    args = parser.parse_args(argv)
    if args.epochs < 2 or args.seeds < 1:
        parser.error("--epochs must be at least 2 (probes don't come at epoch 0), --seeds 1")
    return args


def trained(root, precision, seed, args):
    """Train once; a figure for each name in FIGURES."""
    corpus, run = f"{root}/corpus", f"{root}/{precision}-{seed}"
    words = [sys.executable, f"{ROOT}/train.py", *MODEL, *PROBES]
    words += ["--pathDB", f"{corpus}/audio", "--pathTrain", f"{corpus}/train_split.txt"]
    words += ["--pathVal", f"{corpus}/test_split.txt", "--pathCheckpoint", run]
    words += ["--path_phone_data", f"{corpus}/converted_aligned_phones.txt"]
    words += ["--linsep_classif_each_epochs", str(args.epochs - 1), "--linsep_logs_dir", run]
    words += ["--nEpoch", str(args.epochs), "--random_seed", str(seed), "--nGPU", "1"]
    words += ["--device", args.device, "--precision", precision] + ["--compile"] * args.compile
    start = time.perf_counter()
    if subprocess.run(words, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"training failed: {' '.join(words)}")
    seconds = time.perf_counter() - start
    logs = load_json(f"{run}/checkpoint_logs.json")
    percentages = (
        100 * statistics.mean(logs["locAcc_val"][-1]),
        *(100 * logs[f"{task}_best_val_acc"][-1][0] for task in ("phone", "speaker")),
    )
    values = (statistics.mean(logs["locLoss_val"][-1]), *percentages, seconds)
    return dict(zip(FIGURES, values, strict=True))


def print_table(results, args):
    reference, *others = results
    print(f"{args.seeds} seeds, {args.epochs} epochs{', compiled' * args.compile}")
    print(f"{'':18}" + "".join(f"{name:>18}" for name in results), end="")
    print("".join(f"{f'{name} - {reference}':>16}" for name in others))
    for figure in FIGURES:
        columns = {name: [run[figure] for run in runs] for name, runs in results.items()}
        print(
            f"{figure:18}" + "".join(f"{in_words(values):>18}" for values in columns.values()),
            end="",
        )
        apart = (difference(columns[reference], columns[name]) for name in others)
        print("".join(f"{value:>+16.1f}" for value in apart))


def in_words(values):
    spread = f" +- {deviation(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def deviation(values):
    return statistics.stdev(values) if len(values) > 1 else math.nan


def difference(reference, values):
    """The difference of the means in standard errors."""
    error = math.hypot(*(deviation(v) / math.sqrt(len(v)) for v in (reference, values)))
    return (statistics.mean(values) - statistics.mean(reference)) / error if error else math.nan


if __name__ == "__main__":
    main()
