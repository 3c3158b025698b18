"""Negative sampling, and the scores of predictions against candidate frames.

InfoNCE (van den Oord et al., "Representation learning with contrastive predictive coding", 2018)
compares each prediction with the true future frame and with frames drawn at random from the batch.
The original code copies all drawn vectors once per prediction and multiplies elementwise. Here the
candidates of a few anchors at a time are gathered and scored by matrix products, and gathered
again in the backward pass: less arithmetic, in little memory that stays in the processor's cache.

Cosine scores are those of Kreuk et al., "Self-supervised contrastive learning for unsupervised
phoneme segmentation" (2020), and Cuervo et al., "Contrastive prediction strategies for unsupervised
segmentation and categorization of phonemes and words" (2021).
"""

import importlib.util
import math
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

ANCHORS_AT_ONCE = 32  # on a CPU: the candidates of this many anchors fit its cache
ANCHORS_AT_ONCE_ON_GPU = 1024  # large steps suit a GPU; about 150 MB with the defaults
SHORTEST = 1e-8  # a shorter vector has no direction


def draw_negatives(
    batch_size, n_frames, n_anchors, n_negatives, *, first_offset=1, group=0, device, generator
):
    """Draw the negatives of each anchor.

    A negative of anchor w comes from any window of the batch and lies `first_offset` to
    n_frames - 1 frames after frame w, wrapping around at the end of the window; so with
    first_offset 1 or more, frame w itself is never drawn. With group > 0, rows of the batch are
    split into consecutive groups of `group`, and negatives come from the anchor's own group. (If
    the last group is incomplete, its missing rows are taken from the start of the batch.)

    Draws twice, rows before offsets, from `generator` or, if that is None, from the global
    generator of `device`. Returns (B, W, N) int64 on `device`, indices into the (B * S) frames of
    the batch.
    """
    shape = (batch_size, n_negatives, n_anchors)
    draws_on = device if generator is None else generator.device
    total = batch_size * n_negatives * n_anchors
    row, offset = (
        torch.randint(low, high, (total,), generator=generator, device=draws_on)
        .to(device)
        .view(shape)
        for low, high in ((0, batch_size), (first_offset, n_frames))
    )
    if group:
        own = torch.arange(batch_size, device=device).view(-1, 1, 1)
        row = (row % group + own - own % group) % batch_size
    frame = (offset + torch.arange(n_anchors, device=device)) % n_frames
    return (row * n_frames + frame).transpose(1, 2)


def draw_negatives_within(
    lengths, n_frames, n_anchors, n_negatives, *, first_offset=1, device, generator
):
    """`draw_negatives` where sequence b has only its first lengths[b] of n_frames frames.

    Sequences are drawn first, then offsets from `first_offset` to the drawn sequence's length less
    one, all equally likely. A sequence of `first_offset` frames or fewer, which is never the
    anchor's own, always gets the offset `first_offset`. lengths: (B,) int64.
    """
    shape = (len(lengths), n_anchors, n_negatives)
    draws_on = device if generator is None else generator.device
    row = torch.randint(0, len(lengths), shape, generator=generator, device=draws_on).to(device)
    fraction = torch.rand(shape, generator=generator, device=draws_on).to(device)
    length = lengths[row]
    offset = first_offset + (fraction * (length - first_offset).clamp(min=1)).long()
    frame = (offset + torch.arange(n_anchors, device=device).unsqueeze(1)) % length
    return row * n_frames + frame


def draw_sides(shape, device, generator):
    """-1 or 1 with equal probability, int64 of this shape."""
    draws_on = device if generator is None else generator.device
    return 2 * torch.randint(0, 2, shape, generator=generator, device=draws_on).to(device) - 1


def anchor_frames(batch_size, n_frames, n_anchors, device):
    """The frame of each anchor, (B, W), as indices like those of `draw_negatives`."""
    row = torch.arange(batch_size, device=device).unsqueeze(1)
    return row * n_frames + torch.arange(n_anchors, device=device)


def following_frames(batch_size, n_frames, n_anchors, n_following, device):
    """Frames 1 to n_following after each anchor, (B, W, n_following), as indices like these."""
    anchor = anchor_frames(batch_size, n_frames, n_anchors, device)
    return anchor.unsqueeze(2) + torch.arange(1, n_following + 1, device=device)


def complete_anchors(lengths, n_anchors, n_following):
    """The anchors, of W in each sequence of these lengths, that have all following frames.

    lengths: (B,) int64 -> (X,) int64, indices into the (B * W) anchors of the batch, in order.
    """
    anchors = torch.arange(n_anchors, device=lengths.device)
    return (anchors < (lengths - n_following).unsqueeze(1)).flatten().nonzero().squeeze(1)


class CandidateScores(NamedTuple):
    """Scores of the K predictions of X anchors, see `score_candidates`."""

    positives: torch.Tensor  # (X, K, n_positives), each prediction with each positive
    negatives: torch.Tensor  # (X, K), log-sum-exp of the scores of the negatives
    best_negative: torch.Tensor  # (X, K), highest score of a negative; without gradient
    is_best_negative: torch.Tensor  # (X, K, n_positives) bool: is that negative this positive?

    @property
    def higher(self):
        """Whether each positive scores higher than all negatives, (X, K, n_positives) bool.

        A tie, up to rounding, is a miss: otherwise a network that gives all frames the same score
        would always be right.
        """
        best = self.best_negative.unsqueeze(2)
        return (self.positives > best) & ~torch.isclose(self.positives, best)

    @property
    def hits(self):
        """Whether each positive scores higher than all other frames, (X, K, n_positives) bool.

        If the best negative is the positive frame itself (the same index), that is no mistake.
        """
        return self.higher | self.is_best_negative


def score_candidates(
    pool, predictions, candidates, n_positives, *, cosine=False, temperature=1.0, fused=False
):
    """Score each prediction against the candidates of its anchor, in float32 or float64.

    A score is the dot product divided by E or, with `cosine`, the cosine similarity (0 for a zero
    vector, without gradient); either is divided by `temperature`.

    pool: (F, E) frames; predictions: (X, K, E); candidates: (X, n_positives + N) int64, indices
    into pool, positives first; fused: use the Triton kernels where they can run (in float32 on a
    GPU). Returns CandidateScores.
    """
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    form = _fused_form() if fused and pool.is_cuda and dtype == torch.float32 else _ChunkedScores
    with torch.autocast(pool.device.type, enabled=False):
        pool, predictions = pool.to(dtype), predictions.to(dtype)
        if cosine:
            pool, predictions = unit_length(pool), unit_length(predictions)
        scale = (pool.size(1) if cosine else 1) / temperature  # the products are divided by E
        if scale != 1:
            predictions = predictions * scale
        *scores, place = form.apply(pool, predictions, candidates.contiguous(), n_positives)
    frame = candidates[:, n_positives:].gather(1, place)
    return CandidateScores(*scores, frame.unsqueeze(2) == candidates[:, None, :n_positives])


def unit_length(vectors):
    """vectors (..., E) divided by their length; zero, with a gradient of zero, for zero vectors."""
    squares = vectors.square().sum(dim=-1, keepdim=True)
    return vectors * squares.masked_fill(squares < SHORTEST**2, math.inf).rsqrt()


def _fused_form():
    """FusedScores if Triton is installed, which PyTorch brings along only for GPUs."""
    if importlib.util.find_spec("triton") is None:
        return _ChunkedScores
    from criterion.fused_scores import FusedScores

    return FusedScores


class _ChunkedScores(torch.autograd.Function):
    """Gathers candidates chunk by chunk, forward and backward; only scores are kept in between.

    It uses `index_select` and `index_add_`, since the backward pass of indexing sums in an order
    that changes from run to run. The last output, (X, K) int64, is the place of the best negative
    among the negatives.
    """

    @staticmethod
    def forward(ctx, pool, predictions, candidates, n_positives):
        n_anchors, n_predictions, dim = predictions.shape
        scores = predictions.new_empty(n_anchors, n_predictions, candidates.size(1))
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
        best, place = negatives.max(dim=2)
        ctx.save_for_backward(pool, predictions, candidates, scores, log_sum)
        ctx.mark_non_differentiable(best, place)
        return positives.clone(), log_sum, best, place

    @staticmethod
    @once_differentiable
    def backward(ctx, positives_gradient, log_sum_gradient, *_):
        pool, predictions, candidates, scores, log_sum = ctx.saved_tensors
        n_positives, dim = positives_gradient.size(2), pool.size(1)
        gradient = (scores - log_sum.unsqueeze(2)).exp_().mul_(log_sum_gradient.unsqueeze(2) / dim)
        torch.div(positives_gradient, dim, out=gradient[..., :n_positives])

        pool_gradient = torch.zeros_like(pool)
        predictions_gradient = torch.empty_like(predictions)
        for chunk, vectors in _gathered_chunks(pool, candidates):
            torch.bmm(gradient[chunk], vectors, out=predictions_gradient[chunk])
            # The gathered vectors are no longer needed: their memory takes their gradients.
            torch.bmm(gradient[chunk].transpose(1, 2), predictions[chunk], out=vectors)
            pool_gradient.index_add_(0, candidates[chunk].flatten(), vectors.flatten(0, 1))
        return pool_gradient, predictions_gradient, None, None


def _gathered_chunks(pool, candidates):
    """Yield (slice of anchors, their candidates (anchors, n, E)), all in the same memory."""
    n_anchors, n_candidates = candidates.shape
    at_once = ANCHORS_AT_ONCE if pool.device.type == "cpu" else ANCHORS_AT_ONCE_ON_GPU
    memory = pool.new_empty(min(at_once, n_anchors) * n_candidates, pool.size(1))
    for start in range(0, n_anchors, at_once):
        chunk = slice(start, min(start + at_once, n_anchors))
        wanted = candidates[chunk].flatten()
        vectors = torch.index_select(pool, 0, wanted, out=memory[: wanted.numel()])
        yield chunk, vectors.unflatten(0, (-1, n_candidates))
