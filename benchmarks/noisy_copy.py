"""A copy of a corpus whose test set is reverberant and noisy, to see how robust a model is.

    python benchmarks/noisy_copy.py CORPUS OUT [--seed 1]

CORPUS is what utils/corpus/make_demo.py writes. In OUT, each file of its test_split.txt sounds as
if heard from the other end of a room, with noise; all other files are links to those of CORPUS.
OUT/test_phones.txt has the labels of the noisy files only.

Rooms and noise differ from those that `--augment_type` trains with: the response is noise that
decays exponentially (by 60 dB in 0.3 to 0.7 s), with 0 to 6 dB less energy than the direct path;
the noise is stationary and coloured, 5 to 15 dB below the speech.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils.run.before_torch  # noqa: F401

import soundfile
import torch

from feature_loader import load_waveform
from utils.data.effects import add_noise, coloured, reverberate
from utils.data.labels import LABELS, read_phone_labels, write_labels
from utils.misc import SAMPLE_RATE, generator_from

RT60 = (0.3, 0.7)  # seconds
TAIL = (-6, 0)  # dB, energy of the tail beside the direct path
SNR = (5, 15)  # dB
STEEPEST = 2  # slope of the power spectrum


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    heard = set((args.corpus / "test_split.txt").read_text().split())
    for source in sorted((args.corpus / "audio").rglob("*.flac")):
        target = args.out / source.relative_to(args.corpus)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.stem in heard:
            audio = through_a_room(load_waveform(source), generator_from(args.seed, source.stem))
            soundfile.write(target, audio[0].numpy(), SAMPLE_RATE)
        else:
            target.symlink_to(source.resolve())
    labels = read_phone_labels(args.corpus / LABELS).labels
    write_labels(args.out / "test_phones.txt", {n: ids for n, ids in labels.items() if n in heard})


def through_a_room(waveform, generator):
    """waveform (1, L) -> (1, L), reverberant and noisy, scaled down if it would clip."""

    def between(low, high):
        return low + (high - low) * torch.rand(1, generator=generator)

    def white(n):
        return torch.randn(1, n, generator=generator)

    decay = torch.arange(SAMPLE_RATE) / SAMPLE_RATE / between(*RT60)
    tail = white(SAMPLE_RATE) * 10 ** (-60 / 20 * decay)
    tail *= 10 ** (between(*TAIL) / 20) / tail.norm()
    tail[:, 0] = 1  # the direct path
    noise = coloured(white(waveform.size(1)), between(0, STEEPEST))
    noisy = add_noise(reverberate(waveform, tail), noise, between(*SNR))
    return noisy / noisy.abs().max().clamp(min=1)


if __name__ == "__main__":
    main()
