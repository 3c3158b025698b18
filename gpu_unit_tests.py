"""Tests of training on a GPU; they are skipped where there is none."""

import pytest
import torch

from unit_tests import EXAMPLE, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = ["--device", "cuda", "--nGPU", "1"]


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-3), ("tf32", 5e-3), ("bf16", 0.03)]
)
@pytest.mark.parametrize("words", [[], EXAMPLE, ["--rnnMode", "transformer"]])
def test_a_gpu_computes_what_the_cpu_does(words, precision, tolerance, tiny_corpus, tmp_path):
    """On the weights at the start and the same negatives, those of validation."""
    words = [*words, "--learningRate", "0"]
    on_cpu = trained(tiny_corpus, tmp_path / "cpu", *words, "--device", "cpu", epochs=1)
    words += [*GPU, "--precision", precision]
    on_gpu = trained(tiny_corpus, tmp_path / "gpu", *words, epochs=1)
    for key in ("locLoss_val", "locAcc_val"):
        expected = pytest.approx(sum(on_cpu["logs"][key][0]), rel=tolerance, abs=tolerance)
        assert sum(on_gpu["logs"][key][0]) == expected


@pytest.mark.parametrize("words", [[], ["--compile"], ["--samplingType", "sequential"]])
def test_a_gpu_goes_on_where_it_stopped(words, tiny_corpus, tmp_path):
    whole = trained(tiny_corpus, tmp_path / "whole", *GPU, *words, epochs=2)
    trained(tiny_corpus, tmp_path / "parts", *GPU, *words, epochs=1)
    parts = trained(tiny_corpus, tmp_path / "parts", *GPU, *words, epochs=2)
    for key in ("locLoss_train", "locLoss_val"):
        assert sum(parts["logs"][key][1]) == pytest.approx(sum(whole["logs"][key][1]), rel=1e-3)
