"""What the tests share: golden values of the original program, real speech, a tiny corpus."""

import contextlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME

ROOT = Path(__file__).resolve().parent.parent
COMPACT_GOLDEN = ROOT / "tests" / "golden"  # a part of the golden values, for any clone


def _directory(variable, default):
    return Path(os.environ.get(variable) or ROOT.parent / "shared" / default)


GOLDEN = _directory("CPC_GOLDEN", "golden")
if "CPC_GOLDEN" not in os.environ and not GOLDEN.is_dir():
    GOLDEN = COMPACT_GOLDEN
REAL_SPEECH = _directory("CPC_DATA", "data/librispeech_mini")

needs_real_speech = pytest.mark.skipif(
    not REAL_SPEECH.is_dir(), reason="no LibriSpeech utterances here; CPC_DATA names a directory"
)


@dataclass(frozen=True)
class GoldenCase:
    """One case of a golden set: values computed with the original program, and how."""

    name: str
    kind: str
    config: dict
    path: Path
    state_names: dict

    @cached_property
    def arrays(self):
        """All arrays of the case, as tensors (on CPU, in the type they were stored in)."""
        with np.load(self.path) as file:
            return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}

    def __getitem__(self, name):
        return self.arrays[name]

    def __contains__(self, name):
        return name in self.arrays

    @property
    def state_dict(self):
        return {key: self.arrays[array] for key, array in self.state_names.items()}

    def parameter_gradients(self):
        """Parameter name -> gradient, where the set holds it."""
        return {n[3:]: a for n, a in self.arrays.items() if n.startswith("gp.")}


def golden_cases(*kinds):
    """Every case of these kinds in the golden set, as parameters of a test."""
    manifest = GOLDEN / "manifest.json"
    cases = json.loads(manifest.read_text())["cases"] if manifest.is_file() else {}
    return [
        pytest.param(
            GoldenCase(
                name,
                case["kind"],
                case.get("config") or {},
                GOLDEN / case["file"],
                case.get("state_dict") or {},
            ),
            id=name,
        )
        for name, case in cases.items()
        if case["kind"] in kinds
    ]


def assert_close(actual, expected, tolerance=1e-5, what="values"):
    """Largest absolute error at most `tolerance` times the largest absolute expected value."""
    actual = torch.as_tensor(actual).detach().cpu()
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} instead of {expected.shape}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    assert error <= tolerance * max(scale, 1e-30), (
        f"{what}: largest error {error:.3g}, {error / max(scale, 1e-30):.3g} of the largest value"
    )


def assert_gradients_close(module, expected, tolerance=1e-4):
    """Gradients of the named parameters of `module` against `expected` (name -> tensor)."""
    parameters = dict(module.named_parameters())
    for name, gradient in expected.items():
        assert_close(parameters[name].grad, gradient, tolerance, what=f"gradient of {name}")


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


@contextlib.contextmanager
def ends_refused(capsys, said):
    """A block in which a command ends with status 2 and one line on stderr that matches `said`."""
    with pytest.raises(SystemExit) as end:
        yield
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert re.search(said, error), error


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
