"""Shared by tests and benchmarks: a tiny corpus, and a comparison. It needs no pytest."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME

ROOT = Path(__file__).resolve().parent.parent


def assert_equal_trees(one, other, where):
    """Two trees of dicts and lists hold the same, tensors bit for bit; `where` is for messages."""
    if torch.is_tensor(one):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_trees(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal_trees(a, b, f"{where}[{index}]")
    else:
        assert one == other, where


def write_tiny_corpus(root, *, speakers=3, utterances=3, seconds=(1.4, 3.0), seed=0):
    """A corpus of coloured noise in LibriSpeech layout, with lists and phone labels.

    Writes `audio/`, `train.txt`, `test.txt` (the last utterance of each speaker), `all.txt` and
    `phones.txt` (five classes, each heard as a tone) below `root`, and returns `root` as a Path.
    """
    root = Path(root)
    rng = np.random.default_rng(seed)
    names, labels = [], []
    for speaker in range(speakers):
        for utterance in range(utterances):
            frames = int(rng.uniform(*seconds) * SAMPLE_RATE) // SAMPLES_PER_FRAME
            phones = np.repeat(rng.integers(0, 5, frames // 8 + 1), 8)[:frames]
            phase = np.cumsum(np.repeat(200 + 300 * phones + 20 * speaker, SAMPLES_PER_FRAME))
            wave = 0.3 * np.sin(2 * np.pi * phase / SAMPLE_RATE)
            wave += 0.05 * rng.standard_normal(len(wave))
            wave = np.append(wave, np.zeros(rng.integers(0, SAMPLES_PER_FRAME)))
            name = f"{10 + speaker}-{speaker}-{utterance:04d}"
            path = root / "audio" / str(10 + speaker) / str(speaker) / f"{name}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, wave, SAMPLE_RATE, subtype="PCM_16")
            names.append(name)
            labels.append(f"{name} {' '.join(map(str, phones))}\n")
    last = f"{utterances - 1:04d}"
    (root / "train.txt").write_text("".join(f"{n}\n" for n in names if not n.endswith(last)))
    (root / "test.txt").write_text("".join(f"{n}\n" for n in names if n.endswith(last)))
    (root / "all.txt").write_text("".join(f"{n}\n" for n in names))
    (root / "phones.txt").write_text("".join(labels))
    return root
