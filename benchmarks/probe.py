"""The speed-up of a probe that computes the features of the frozen model only once.

    python benchmarks/probe.py

Probes a model of the default size on synthetic audio, with features kept and with features
computed again in every epoch, one after the other, `--repeat` times; medians are compared. The
claim to be checked: over ten epochs the former takes at most a sixth of the time.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import torch

from dataset import AudioDataset
from eval.probe import Probe
from eval.probe_options import ProbeOptions
from model import build_model
from tests.common import write_tiny_corpus
from utils.data.corpus import scan_corpus
from utils.data.labels import read_phone_labels
from utils.run.flags import build_parser as build_train_parser
from utils.run.machine import keep_freed_memory

PROBES = {"phone": {}, "phone by CTC": {"ctc": True}, "speaker": {}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n_epoch", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        root = write_tiny_corpus(directory, utterances=4, seconds=(4, 6))
        corpus, labels = scan_corpus(root / "audio"), read_phone_labels(root / "phones.txt")
        model = build_model(build_train_parser().parse_args([])).to(args.device)
        print(f"{args.n_epoch} epochs; device {args.device}, {torch.get_num_threads()} threads")
        for name, changes in PROBES.items():
            options = ProbeOptions(n_epochs=args.n_epoch, **changes)
            compare(name, model, corpus, labels, options, args)


def compare(name, model, corpus, labels, options, args):
    task = name.split()[0]
    sets = [make_set(corpus, labels if task == "phone" else None, last) for last in (False, True)]
    n_classes = labels.n_phones if task == "phone" else len(corpus.speakers)
    seconds = {"kept": [], "recomputed": []}
    for _ in range(args.repeat):
        for way, limit in (("recomputed", 0), ("kept", None)):
            probe = Probe(
                task, model, *sets, n_classes, replace(options, max_stored_bytes=limit), args.device
            )
            seconds[way].append(time_of(probe))
    kept, again = (statistics.median(seconds[way]) for way in ("kept", "recomputed"))
    n_windows = sum(part.n_windows for part in sets)
    print(
        f"{name:13} {n_windows} windows: features kept {kept:6.2f} s, recomputed {again:6.2f} s, "
        f"1/{again / kept:.1f} of the time"
    )


def make_set(corpus, labels, last):
    """The last utterance of each speaker, or the others."""
    chosen = [s for s in corpus.utterances if s.name.endswith("0003") == last]
    audio = AudioDataset(
        corpus, chosen, 20480, phone_labels=labels, labelled_only=labels is not None
    )
    audio.only_pack()  # decoding isn't what is measured
    return audio


def time_of(probe):
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        probe.run()  # reads accuracies at the end, so the device is done
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
