"""Shared by tests: golden values of the original program, real speech, and tests/common.py."""

import contextlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.common import ROOT, assert_equal_trees, write_tiny_corpus  # noqa: F401, for tests

COMPACT_GOLDEN = ROOT / "tests" / "golden"  # a part of the golden values, for any clone


def _directory(variable, default):
    return Path(os.environ.get(variable) or ROOT.parent / "shared" / default)


GOLDEN = _directory("CPC_GOLDEN", "golden")
if "CPC_GOLDEN" not in os.environ and not GOLDEN.is_dir():
    GOLDEN = COMPACT_GOLDEN
GOLDEN_HCPC = _directory("CPC_GOLDEN_HCPC", "golden_hcpc")
if "CPC_GOLDEN_HCPC" not in os.environ and not GOLDEN_HCPC.is_dir():
    GOLDEN_HCPC = COMPACT_GOLDEN / "hcpc"
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


def hcpc_cases(name_in_params):
    """The cases of the golden set of hCPC whose parameters have this name: (params, arrays)."""
    manifest = GOLDEN_HCPC / "manifest.json"
    cases = json.loads(manifest.read_text())["cases"] if manifest.is_file() else {}
    return [
        pytest.param(case["params"], GOLDEN_HCPC / f"{name}.npz", id=name)
        for name, case in cases.items()
        if name_in_params in case["params"]
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
