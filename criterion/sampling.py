"""Negatives: which frames they are, and how predictions score against them.

InfoNCE (van den Oord et al., "Representation learning with contrastive predictive coding", 2018)
compares each prediction with the frame that really follows and with frames drawn at random from
the batch. The original form copies all drawn vectors once per prediction and multiplies them
element by element. Here a few windows at a time are gathered and multiplied as matrices, forward
and once more backward: less arithmetic, and little memory that the processor's cache can hold.
"""

import importlib.util
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

WINDOWS_AT_ONCE = 32  # on a CPU: the vectors of so many windows stay in the cache
WINDOWS_AT_ONCE_ON_GPU = 1024  # there, each step should be large; about 150 MB by default


def draw_negatives(
    n_sequences, n_frames, n_windows, n_negatives, *, first_offset=1, group=0, device, generator
):
    """Draw for each window of each sequence the frames that serve as its negatives.

    A negative of window w lies `first_offset` to n_frames - 1 frames after frame w, around the
    end of the sequence to its start, in any sequence of the batch; so frame w itself is never
    drawn where first_offset is 1. With group > 0 it comes from the sequences that share an
    aligned group of `group` rows with the window's own. (Of an incomplete last group, sequences
    beyond the batch are replaced by those at its start.)

    Draws twice, sequences before offsets, from `generator`, or from the global generator of
    `device` if that is None. Returns (B, W, N) int64 on `device`, indices into the (B * S) frames
    of the batch.
    """
    shape = (n_sequences, n_negatives, n_windows)
    draws_on = device if generator is None else generator.device
    total = n_sequences * n_negatives * n_windows
    sequence, offset = (
        torch.randint(low, high, (total,), generator=generator, device=draws_on)
        .to(device)
        .view(shape)
        for low, high in ((0, n_sequences), (first_offset, n_frames))
    )
    if group:
        own = torch.arange(n_sequences, device=device).view(-1, 1, 1)
        sequence = (sequence % group + own - own % group) % n_sequences
    frame = (offset + torch.arange(n_windows, device=device)) % n_frames
    return (sequence * n_frames + frame).transpose(1, 2)


def following_frames(n_sequences, n_frames, n_windows, n_following, device):
    """The frames after each window's, (B, W, n_following) int64, indices like `draw_negatives`."""
    sequence = torch.arange(n_sequences, device=device).view(-1, 1, 1)
    window = torch.arange(n_windows, device=device).view(-1, 1)
    return sequence * n_frames + window + torch.arange(1, n_following + 1, device=device)


class CandidateScores(NamedTuple):
    """How the K predictions of X windows score: mean over features of the products."""

    positives: torch.Tensor  # (X, K, n_positives), every prediction with every positive
    negatives: torch.Tensor  # (X, K), log of the sum of exp(score) over the negatives
    best_negative: torch.Tensor  # (X, K), the highest score of a negative; has no gradient


def score_candidates(pool, predictions, candidates, n_positives, fused=False):
    """Score each prediction with the candidates of its window, in float32 at least.

    pool: (F, E) frames; predictions: (X, K, E); candidates: (X, n_positives + N) int64, indices
    into pool, positives first; fused: in kernels written for it, where they can run (in float32
    on a GPU, with Triton). Returns CandidateScores.
    """
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    form = _fused_form() if fused and pool.is_cuda and dtype == torch.float32 else _ChunkedScores
    with torch.autocast(pool.device.type, enabled=False):
        scores = form.apply(
            pool.to(dtype), predictions.to(dtype), candidates.contiguous(), n_positives
        )
    return CandidateScores(*scores)


def _fused_form():
    """FusedScores where Triton is installed: it comes with PyTorch for GPUs only."""
    if importlib.util.find_spec("triton") is None:
        return _ChunkedScores
    from criterion.fused_scores import FusedScores

    return FusedScores


class _ChunkedScores(torch.autograd.Function):
    """Gathers vectors chunk by chunk in both directions and keeps only their scores between.

    `index_select` and `index_add_` rather than indexing, whose backward adds up in an order that
    changes from run to run.
    """

    @staticmethod
    def forward(ctx, pool, predictions, candidates, n_positives):
        n_windows, n_predictions, dim = predictions.shape
        scores = predictions.new_empty(n_windows, n_predictions, candidates.size(1))
        for chunk, vectors in _gathered_chunks(pool, candidates):
            torch.baddbmm(
                scores[chunk],
                predictions[chunk],
                vectors.transpose(1, 2),
                beta=0,
                alpha=1 / dim,
                out=scores[chunk],
            )
        positives, negatives = scores[..., :n_positives], scores[..., n_positives:]
        log_sum = negatives.logsumexp(dim=2)
        best = negatives.amax(dim=2)
        ctx.save_for_backward(pool, predictions, candidates, scores, log_sum)
        ctx.mark_non_differentiable(best)
        return positives.clone(), log_sum, best

    @staticmethod
    @once_differentiable
    def backward(ctx, positives_gradient, log_sum_gradient, _):
        pool, predictions, candidates, scores, log_sum = ctx.saved_tensors
        n_positives, dim = positives_gradient.size(2), pool.size(1)
        gradient = (scores - log_sum.unsqueeze(2)).exp_().mul_(log_sum_gradient.unsqueeze(2) / dim)
        torch.div(positives_gradient, dim, out=gradient[..., :n_positives])

        pool_gradient = torch.zeros_like(pool)
        predictions_gradient = torch.empty_like(predictions)
        for chunk, vectors in _gathered_chunks(pool, candidates):
            torch.bmm(gradient[chunk], vectors, out=predictions_gradient[chunk])
            # The gathered vectors have done their part: their gradients take their place.
            torch.bmm(gradient[chunk].transpose(1, 2), predictions[chunk], out=vectors)
            pool_gradient.index_add_(0, candidates[chunk].flatten(), vectors.flatten(0, 1))
        return pool_gradient, predictions_gradient, None, None


def _gathered_chunks(pool, candidates):
    """Yield (slice of windows, their candidates' vectors (windows, n, E)), reusing the memory."""
    n_windows, n_candidates = candidates.shape
    at_once = WINDOWS_AT_ONCE if pool.device.type == "cpu" else WINDOWS_AT_ONCE_ON_GPU
    memory = pool.new_empty(min(at_once, n_windows) * n_candidates, pool.size(1))
    for start in range(0, n_windows, at_once):
        chunk = slice(start, min(start + at_once, n_windows))
        wanted = candidates[chunk].flatten()
        vectors = torch.index_select(pool, 0, wanted, out=memory[: wanted.numel()])
        yield chunk, vectors.unflatten(0, (-1, n_candidates))
