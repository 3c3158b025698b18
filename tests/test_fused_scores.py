"""The kernels against their plain twin: on the CPU, by Triton's interpreter.

Triton decides when it is imported whether it compiles or interprets, so a separate process
interprets. On a GPU, test_gpu.py tests the kernels, with `fused_errors` as well.
"""

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from criterion import sampling
from criterion.cpc import CPCCriterion

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton, which comes with PyTorch for GPUs, is not installed",
)
NAMES = ("positives", "log-sum-exp", "best negative", "gradient of pool", "of predictions")
PLACE = 3  # of the place of the best negative in what a form returns

SIZES = [  # anchors, predictions, positives, negatives, features
    (1, 1, 1, 1, 1),  # the least
    (1, 12, 12, 128, 256),  # the defaults
    (3, 8, 12, 10, 96),
    (2, 9, 12, 128, 250),
    (2, 13, 1, 31, 64),
    (5, 1, 1, 10, 24),
    (2, 4, 40, 5, 100),  # the first block holds positives only
    (2, 17, 3, 32, 33),  # more predictions than a block usually holds
]


def random_inputs(n_anchors, n_predictions, n_positives, n_negatives, dim, *, scale=1, n_frames=50):
    """Few frames, so that some are drawn several times; tensors whose dimensions are swapped."""
    generator = torch.Generator().manual_seed(n_anchors + dim)
    pool = torch.randn(dim, n_frames, generator=generator).T
    predictions = scale * torch.randn(n_predictions, n_anchors, dim, generator=generator)
    candidates = (n_positives + n_negatives, n_anchors)
    candidates = torch.randint(n_frames, candidates, generator=generator).T
    return pool, predictions.transpose(0, 1), candidates, n_positives


def results(form, pool, predictions, candidates, n_positives):
    """Outputs of `form`, and its gradients for random upstream gradients; expanded ones."""
    leaves = [leaf.detach().requires_grad_() for leaf in (pool, predictions)]
    scores = form.apply(*leaves, candidates, n_positives)
    generator = torch.Generator().manual_seed(0)
    upstream = [
        torch.randn(shape, generator=generator).to(pool).expand_as(values)
        for values, shape in ((scores[0], (1, *scores[0].shape[1:])), (scores[1], ()))
    ]
    assert not scores[2].requires_grad
    gradients = torch.autograd.grad(scores[:2], leaves, upstream)
    assert_place(candidates[:, n_positives:], *leaves, *scores[2:])
    return [values.detach().cpu().double() for values in (*scores[:PLACE], *gradients)]


def assert_place(negatives, pool, predictions, best, place):
    """The negative at `place` has the best score: of several equal ones, any."""
    vectors = pool[negatives.gather(1, place)].double()
    scores = (predictions.double() * vectors).mean(dim=2)
    torch.testing.assert_close(scores, best.double(), rtol=1e-4, atol=1e-4)


def relative_errors(actual, expected):
    """Largest error relative to the largest value, by name; NaN where there is one."""
    return {
        name: ((one - other).abs().max() / other.abs().max()).item()
        for name, one, other in zip(NAMES, actual, expected, strict=True)
    }


def fused_errors(device, sizes, **options):
    """How far the kernels on `device` are from the plain twin in float64 on the CPU."""
    from criterion.fused_scores import FusedScores

    pool, predictions, *rest = random_inputs(*sizes, **options)
    expected = results(sampling._ChunkedScores, pool.double(), predictions.double(), *rest)
    pool, predictions, candidates = (x.to(device) for x in (pool, predictions, rest[0]))
    return relative_errors(results(FusedScores, pool, predictions, candidates, rest[1]), expected)


def assert_exact(errors):
    """As exact as float32: a rounding costs 6e-8, in tf32 5e-4, and sums have a few hundred."""
    assert all(error <= 1e-5 for error in errors.values()), errors


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function in a process where Triton interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield lambda *args, **options: process.submit(*args, **options).result()


@needs_triton
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernels_against_their_plain_twin(sizes, interpreted):
    assert_exact(interpreted(fused_errors, "cpu", sizes))


@needs_triton
@pytest.mark.parametrize("n_frames", [1, 50])
def test_kernels_with_large_scores(n_frames, interpreted):
    """Of either sign, with exponentials beyond float32; one outweighs the others or all tie."""
    sizes = (3, 5, 3, 40, 20)
    assert_exact(interpreted(fused_errors, "cpu", sizes, scale=500, n_frames=n_frames))


def name_of_the_fused_form():
    return sampling._fused_form().__name__


@needs_triton
def test_with_triton_there_are_kernels(interpreted):
    assert interpreted(name_of_the_fused_form) == "FusedScores"


def test_without_triton_the_plain_twin_scores(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert name_of_the_fused_form() == "_ChunkedScores"


def test_without_a_gpu_the_plain_twin_scores():
    inputs = [x.contiguous() for x in random_inputs(2, 3, 2, 5, 8)[:3]]
    plain, fused = (sampling.score_candidates(*inputs, 2, fused=fused) for fused in (False, True))
    assert all(torch.equal(*pair) for pair in zip(plain, fused, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_criterion_passes_on_how_to_score(fused, monkeypatch):
    asked = []

    def record(*args, fused, original=sampling.score_candidates, **options):
        asked.append(fused)
        return original(*args, fused=fused, **options)

    monkeypatch.setattr(sampling, "score_candidates", record)
    criterion = CPCCriterion(2, dim_context=8, dim_encoded=8, n_frames=10, rnn_mode="linear")
    names = list(criterion.state_dict())
    if fused:
        criterion.fused_scores = True
    criterion(torch.randn(2, 10, 8), torch.randn(2, 10, 8), torch.zeros(2, dtype=torch.long))
    assert asked == [fused]
    assert list(criterion.state_dict()) == names
