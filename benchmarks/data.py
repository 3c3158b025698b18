"""Speed and memory of listing a corpus, decoding it, and cutting it into batches.

    python benchmarks/data.py [--hours 1] [--threads 2] [--json FILE]

The corpus is noise with the spectrum and the loudness of speech, in a temporary directory. Each
measurement runs in a new process. Decoding is measured in wall-clock time and in processor time,
which other load disturbs less. Memory is what is added to that of the imports: with packs it
doesn't grow with the corpus. The files are in the system's cache; the time that a disk or a network
adds isn't measured.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import numpy as np
import soundfile

from dataset import AudioDataset, BatchLoader
from utils.data.corpus import scan_corpus
from utils.files import save_json
from utils.misc import SAMPLE_RATE
from utils.run.machine import keep_freed_memory, n_processors

SECONDS = 12  # of a file, about as in LibriSpeech
WINDOW, BATCH = 20_480, 8
PACK_HOURS = 0.25


def main(argv=None):
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="cpc-benchmark-") as root:
        write_corpus(root, round(args.hours * 3600 / SECONDS))
        results = {
            **in_new_process(measure_listing, root, args.threads),
            **in_new_process(measure_decoding, root, 1),
            **in_new_process(measure_decoding, root, args.threads),
            **in_new_process(measure_batches, root, args.threads),
        }
        for share in (0.25, 0.5, 1):
            results |= in_new_process(measure_memory, root, args.threads, share * args.hours)
    for name, value in results.items():
        print(f"{name:<62}{value:>12,.1f}" if value < 100 else f"{name:<62}{value:>12,.0f}")
    if args.json:
        save_json(args.json, {**vars(args), "results": results})


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, default=1, help="of audio in the corpus")
    parser.add_argument("--threads", type=int, default=n_processors(), help="that decode")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(argv)


def write_corpus(root, n_files):
    """Noise that FLAC compresses about as well as speech."""
    rng = np.random.default_rng(0)
    for i in range(n_files):
        noise = rng.standard_normal(SECONDS * SAMPLE_RATE).astype(np.float32)
        wave = np.convolve(noise, 0.9 ** np.arange(60), mode="same")
        loudness = np.repeat(rng.random(SECONDS * 5) ** 3, SAMPLE_RATE // 5)
        folder = os.path.join(root, f"{i % 20:02d}", f"{i % 7}")
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"{i % 20:02d}-{i:05d}.flac")
        soundfile.write(path, (800 * loudness * wave).astype(np.int16), SAMPLE_RATE)


def in_new_process(measure, *args):
    """Return `measure(*args)`, computed in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1, keep_freed_memory) as pool:
        return pool.apply(measure, args)


def timed(function, *args):
    """(result, seconds)"""
    start = time.perf_counter()
    return function(*args), time.perf_counter() - start


def measure_listing(root, n_threads):
    corpus, first = timed(scan_corpus, root, ".flac", 1, True, n_threads)
    _, again = timed(scan_corpus, root)
    return {
        f"listing, files/s, {n_threads} threads": len(corpus.utterances) / first,
        "listing again, files/s": len(corpus.utterances) / again,
    }


def measure_decoding(root, n_threads):
    corpus = scan_corpus(root)
    audio = AudioDataset(corpus, corpus.utterances, WINDOW, n_threads=n_threads)
    busy = time.process_time()
    _, seconds = timed(audio.only_pack)
    busy = time.process_time() - busy
    return {
        f"decoding, x real time, {n_threads} threads": audio.hours * 3600 / seconds,
        f"decoding, x real time per processor, {n_threads} threads": audio.hours * 3600 / busy,
    }


def measure_batches(root, n_threads):
    corpus = scan_corpus(root)
    audio = AudioDataset(corpus, corpus.utterances, WINDOW, n_threads=n_threads)
    audio.only_pack()
    results = {}
    for sampling in ("samespeaker", "uniform", "sequential"):
        loader = BatchLoader(audio, BATCH, sampling, seed=0, training=True)
        n_windows, seconds = timed(run_epoch, loader)
        results[f"batches of {BATCH} from a decoded pack, {sampling}, windows/s"] = (
            n_windows / seconds
        )
    return results


def run_epoch(loader):
    return sum(len(batch.to("cpu").window) for _, batch in loader.epoch(0))


def measure_memory(root, n_threads, hours):
    """Peak memory above that of the imports, in packs and in one, for a part of the corpus."""
    corpus = scan_corpus(root)
    part = corpus.utterances[: round(hours * 3600 / SECONDS)]
    size = round(PACK_HOURS * 3600 * SAMPLE_RATE)
    before, results = peak_memory(), {}
    for what, max_size in ((f"packs of {PACK_HOURS} h", size), ("one pack", 10**12)):
        audio = AudioDataset(corpus, part, WINDOW, max_size_loaded=max_size, n_threads=n_threads)
        loader = BatchLoader(audio, BATCH, "samespeaker", seed=0, training=True)
        n_windows, seconds = timed(run_epoch, loader)
        loader.close()
        name = f"{hours:g} h in {what}"
        if max_size == size:
            results[f"{name}, windows/s with decoding"] = n_windows / seconds
        results[f"{name}, peak memory MB"] = peak_memory() - before
    return results


def peak_memory():
    """Peak memory of this process in MB."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
