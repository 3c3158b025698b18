"""Tests on a GPU, skipped where there is none. cuda_unit_tests.py imitates some of it."""

import pytest
import torch

import trainer
import transformers
from criterion import sampling
from criterion.fused_unit_tests import (
    SIZES,
    assert_exact,
    fused_errors,
    needs_triton,
    random_inputs,
    relative_errors,
)
from criterion.prediction import PredictionNetwork
from dataset import Batch
from unit_tests import EXAMPLE, trained
from utils.cuda_graph import WARM_UP, RecordedPasses
from utils.testing import assert_close

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


@pytest.mark.parametrize("words", [[], EXAMPLE, ["--rnnMode", "transformer", "--dropout"]])
def test_recorded_steps_train_alike(words, tiny_corpus, tmp_path, capsys, monkeypatch):
    """As compiled ones that are launched kernel by kernel, draws and all."""
    words = [*GPU, *words, "--compile"]
    replayed = trained(tiny_corpus, tmp_path / "replayed", *words)
    assert "can't be recorded" not in capsys.readouterr().out
    monkeypatch.setattr(trainer.Trainer, "can_be_recorded", lambda self: False)
    plain = trained(tiny_corpus, tmp_path / "plain", *words)
    for key in ("locLoss_train", "locLoss_val", "gradNorm_train"):
        for expected, found in zip(plain["logs"][key], replayed["logs"][key], strict=True):
            assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("words", [[], EXAMPLE])
def test_compiled_steps_train_alike(words, tiny_corpus, tmp_path):
    """As others where nothing is dropped: compiled code draws other numbers for that."""
    words = [*GPU, *words, "--rnnMode", "linear"]
    plain = trained(tiny_corpus, tmp_path / "plain", *words)
    compiled = trained(tiny_corpus, tmp_path / "compiled", *words, "--compile")
    for key in ("locLoss_train", "locLoss_val", "gradNorm_train"):
        for expected, found in zip(plain["logs"][key], compiled["logs"][key], strict=True):
            assert found == pytest.approx(expected, rel=1e-3)


def test_a_recording_that_fails_leaves_a_usable_device(capsys):
    """Draws and streams are as if it had not been tried."""

    def passes(batch):
        drawn = torch.rand(3, device="cuda")
        drawn.sum().item()  # waits for the device
        return (drawn,)

    recorded = RecordedPasses(passes, [], 1)
    batch = Batch(*[torch.zeros(1, device="cuda")] * 5)
    before = torch.cuda.current_stream()
    found = []
    for _ in range(WARM_UP + 2):
        torch.manual_seed(5)
        found.append(recorded(batch)[0])
    assert "can't be recorded" in capsys.readouterr().out
    assert torch.cuda.current_stream() == before
    assert all(torch.equal(drawn, found[0]) for drawn in found)


@pytest.mark.parametrize(
    "words",
    [
        EXAMPLE,
        ["--rnnMode", "LSTM", "--arMode", "GRU"],
        ["--rnnMode", "transformer", "--hiddenEncoder", "64", "--hiddenGar", "64"],
    ],
)
def test_gradients_of_bf16_point_where_those_of_fp32_do(words, tiny_corpus, tmp_path, monkeypatch):
    """None vanishes, and what a step makes of them is alike: those of the first step."""
    found, train_on = {}, trainer.Trainer.train_on

    def noted(self, *item):
        passes = self.passes

        def and_kept(batch):
            results = passes(batch)
            gradients = [p.grad.flatten() for p in self.step.parameters()]
            found.setdefault(self.args.precision, torch.cat(gradients).clone())
            return results

        self.passes = and_kept
        train_on(self, *item)
        self.passes = passes

    monkeypatch.setattr(trainer.Trainer, "train_on", noted)
    monkeypatch.setattr(transformers, "DROPOUT", 0.0)
    for precision in ("fp32", "bf16"):
        directory = tmp_path / precision
        trained(tiny_corpus, directory, *GPU, *words, "--precision", precision, epochs=1)
    assert torch.cosine_similarity(found["fp32"], found["bf16"], dim=0) > 0.98


@pytest.mark.parametrize("rnn_mode", ["transformer", "linear", "ffd", "conv4", "RNN", "LSTM"])
def test_heads_on_a_gpu(rnn_mode):
    """All in one go, with the values and gradients of one by one on the CPU."""
    network = PredictionNetwork(3, 64, 64, 30, rnn_mode=rnn_mode).eval()
    context = torch.randn(4, 30, 64)
    results = {}
    for device in ("cpu", "cuda"):
        given = context.to(device).requires_grad_()
        leaves = given, *network.to(device).parameters()
        predictions = network(given)
        results[device] = predictions, *torch.autograd.grad(predictions.sin().sum(), leaves)
    for on_gpu, on_cpu in zip(results["cuda"], results["cpu"], strict=True):
        assert_close(on_gpu, on_cpu.detach(), 1e-3, rnn_mode)


def test_a_step_waits_for_the_device_only_to_log(tiny_corpus, tmp_path, monkeypatch):
    train_on = trainer.Trainer.train_on

    def without_waiting(self, *item):
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_on(self, *item)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.Trainer, "train_on", without_waiting)
    trained(tiny_corpus, tmp_path, *GPU, *EXAMPLE, "--logging_step", "1000")


@needs_triton
@pytest.mark.parametrize("sizes", [*SIZES, (2000, 12, 12, 128, 256)], ids=str)
def test_fused_scores_on_a_gpu(sizes):
    assert_exact(fused_errors("cuda", sizes, n_frames=500))


@needs_triton
def test_fused_scores_of_large_scores():
    """Those of a few hundred are exact to a few 1e-5, so their exponentials are, relatively."""
    errors = fused_errors("cuda", (3, 5, 3, 40, 20), scale=500)
    assert all(error <= 2e-4 for error in errors.values()), errors


@needs_triton
def test_scores_are_fused_on_request(monkeypatch):
    pool, predictions, candidates, _ = random_inputs(3, 2, 2, 5, 16)
    inputs = pool.cuda(), predictions.cuda(), candidates.cuda(), 2
    plain = sampling.score_candidates(*inputs)
    monkeypatch.setattr(sampling, "_ChunkedScores", None)
    fused = sampling.score_candidates(*inputs, fused=True)
    for actual, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AttributeError):  # the plain twin, which is gone, does float64
        sampling.score_candidates(*(x.double() for x in inputs[:2]), *inputs[2:], fused=True)


@needs_triton
def test_fused_scores_in_a_cuda_graph():
    """Captured with some inputs and replayed with others, it computes what it does outside."""
    from criterion.fused_scores import FusedScores

    pool, predictions, candidates, n_positives = random_inputs(9, 3, 2, 30, 64)
    inputs = [pool.cuda(), predictions.cuda(), candidates.cuda()]

    def step():
        leaves = [leaf.detach().requires_grad_() for leaf in inputs[:2]]
        scores = FusedScores.apply(*leaves, inputs[2], n_positives)
        total = scores[0].sum() + scores[1].sum()
        return *(values.detach() for values in scores), *torch.autograd.grad(total, leaves)

    side = torch.cuda.Stream()  # a graph is captured after a step on another stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for values in inputs[:2]:
        values.copy_(torch.randn_like(values))
    inputs[2].copy_(inputs[2].flip(0))
    graph.replay()
    expected = [values.cpu().double() for values in step()]
    assert_exact(relative_errors([values.cpu().double() for values in captured], expected))
