"""Scores of candidates in kernels of their own, for a GPU; in Triton.

The same numbers as `sampling._ChunkedScores`, which is the form to read first and the one that
the tests compare with. There, the vectors of a few hundred windows' candidates are written to
memory, read by a matrix product, and again, gradients included, on the way back. Here, each
vector goes from the pool, which a GPU's L2 cache holds (1 kB a frame by default), straight to the
processor that multiplies it, and only scores are written. Gradients of the pool are added up
atomically, in an order that varies: their last bits differ from run to run on a GPU.

One program of the forward pass scores one window; one of the backward pass has a window and a
block of features. Scores are kept between the two: K floats for each candidate are little beside
the K predictions themselves, and with them a block of features needs none of the others.

Triton compiles the kernels at their first launch, for the sizes it meets, so launch them once
before a CUDA graph is captured. Nothing here waits for the GPU or tries out alternatives.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

# Blocks of the matrix products. Compiled for an H100, 256 features and up to 16 predictions, the
# forward kernel takes about 130 registers in a thread and 12 kB of shared memory, the backward one
# about 170 and 21 kB: nothing spills, and a processor has room for 15 programs or 6. One warp for
# products of 16 x 32, two for 16 x 64, give each thread 4 x 4 of them: it multiplies each value
# that it reads from shared memory, the bottleneck, four times.
CANDIDATES_AT_ONCE = 32
FEATURES_FORWARD, WARPS_FORWARD = 32, 1
FEATURES_BACKWARD, WARPS_BACKWARD = 64, 2
SMALLEST_BLOCK = 16  # of the dimensions of tl.dot


class FusedScores(torch.autograd.Function):
    """Like `sampling._ChunkedScores`, in float32 only. Indices must be right: none is checked."""

    @staticmethod
    def forward(ctx, pool, predictions, candidates, n_positives):
        pool, predictions = pool.contiguous(), predictions.contiguous()
        candidates = candidates.contiguous()
        n_windows, n_predictions, _ = predictions.shape
        scores = predictions.new_empty(n_windows, n_predictions, candidates.size(1))
        log_sum = predictions.new_empty(n_windows, n_predictions)
        best = torch.empty_like(log_sum)
        blocks = _blocks(n_predictions, FEATURES_FORWARD, WARPS_FORWARD)
        with torch.cuda.device_of(pool):
            _score_window[(n_windows,)](
                *(pool, predictions, candidates, scores, log_sum, best),
                *(n_predictions, candidates.size(1), n_positives, pool.size(1)),
                **blocks,
            )
        ctx.save_for_backward(pool, predictions, candidates, scores, log_sum)
        ctx.mark_non_differentiable(best)
        return scores[..., :n_positives].clone(), log_sum, best

    @staticmethod
    @once_differentiable
    def backward(ctx, positives_gradient, log_sum_gradient, _):
        pool, predictions, candidates, scores, log_sum = ctx.saved_tensors
        n_windows, n_predictions, dim = predictions.shape
        pool_gradient = torch.zeros_like(pool)
        predictions_gradient = torch.empty_like(predictions)
        blocks = _blocks(n_predictions, FEATURES_BACKWARD, WARPS_BACKWARD)
        with torch.cuda.device_of(pool):
            _differentiate_window[(n_windows, triton.cdiv(dim, FEATURES_BACKWARD))](
                *(pool, predictions, candidates, scores, log_sum),
                *(positives_gradient.contiguous(), log_sum_gradient.contiguous()),
                *(pool_gradient, predictions_gradient),
                *(n_predictions, candidates.size(1), positives_gradient.size(2), dim),
                **blocks,
            )
        return pool_gradient, predictions_gradient, None, None


def _blocks(n_predictions, n_features, n_warps):
    """Sizes of a kernel's blocks; more predictions get more warps, so that registers suffice."""
    predictions = max(SMALLEST_BLOCK, triton.next_power_of_2(n_predictions))
    return {
        "PREDICTIONS": predictions,
        "CANDIDATES": CANDIDATES_AT_ONCE,
        "FEATURES": n_features,
        "num_warps": n_warps * predictions // SMALLEST_BLOCK,
    }


# In the kernels, tensors are contiguous, and positions in them have 64 bits. Sizes are those of
# `score_candidates`; PREDICTIONS, CANDIDATES and FEATURES are how many are handled at once, beyond
# the end of a tensor as zeros (predictions, vectors) or as what has no weight (scores).


@triton.jit
def _score_window(
    pool,  # (F, E)
    predictions,  # (X, K, E)
    candidates,  # (X, C)
    scores,  # (X, K, C), written
    log_sum,  # (X, K), written
    best,  # (X, K), written
    n_predictions: tl.constexpr,
    n_candidates: tl.constexpr,
    n_positives: tl.constexpr,
    dim: tl.constexpr,
    PREDICTIONS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Scores of a window's candidates; the greatest of negatives, and log of their exps' sum."""
    window = tl.program_id(0).to(tl.int64)
    prediction = tl.arange(0, PREDICTIONS)
    row = window * n_predictions + prediction
    in_rows = prediction < n_predictions
    # Finite: a block of positives only leaves them as they are, where -inf would give inf - inf.
    highest = tl.full((PREDICTIONS,), -3e38, tl.float32)
    total = tl.zeros((PREDICTIONS,), tl.float32)  # of exp(score - highest)

    for first in range(0, n_candidates, CANDIDATES):
        column = first + tl.arange(0, CANDIDATES)
        in_columns = column < n_candidates
        frame = tl.load(candidates + window * n_candidates + column, mask=in_columns, other=0)
        products = tl.zeros((PREDICTIONS, CANDIDATES), tl.float32)
        for first_feature in range(0, dim, FEATURES):
            feature = first_feature + tl.arange(0, FEATURES)
            in_dim = feature < dim
            predicted = tl.load(
                predictions + row[:, None] * dim + feature[None, :],
                mask=in_rows[:, None] & in_dim[None, :],
                other=0.0,
            )
            vectors = tl.load(
                pool + frame[None, :] * dim + feature[:, None],
                mask=in_columns[None, :] & in_dim[:, None],
                other=0.0,
            )
            products = tl.dot(predicted, vectors, products, input_precision="ieee")
        block = products * (1.0 / dim)
        tl.store(
            scores + row[:, None] * n_candidates + column[None, :],
            block,
            mask=in_rows[:, None] & in_columns[None, :],
        )
        is_negative = in_columns & (column >= n_positives)
        block = tl.where(is_negative[None, :], block, -float("inf"))
        higher = tl.maximum(highest, tl.max(block, axis=1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(block - higher[:, None]), axis=1)
        highest = higher

    tl.store(log_sum + row, highest + tl.log(total), mask=in_rows)
    tl.store(best + row, highest, mask=in_rows)


@triton.jit
def _differentiate_window(
    pool,  # (F, E)
    predictions,  # (X, K, E)
    candidates,  # (X, C)
    scores,  # (X, K, C)
    log_sum,  # (X, K)
    positives_gradient,  # (X, K, n_positives)
    log_sum_gradient,  # (X, K)
    pool_gradient,  # (F, E), added to
    predictions_gradient,  # (X, K, E), written
    n_predictions: tl.constexpr,
    n_candidates: tl.constexpr,
    n_positives: tl.constexpr,
    dim: tl.constexpr,
    PREDICTIONS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Gradients of a window's predictions and of its candidates, for a block of features."""
    window = tl.program_id(0).to(tl.int64)
    prediction = tl.arange(0, PREDICTIONS)
    row = window * n_predictions + prediction
    in_rows = prediction < n_predictions
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    in_dim = feature < dim
    predicted_at = row[:, None] * dim + feature[None, :]
    in_predicted = in_rows[:, None] & in_dim[None, :]
    predicted = tl.load(predictions + predicted_at, mask=in_predicted, other=0.0)
    row_log_sum = tl.load(log_sum + row, mask=in_rows, other=0.0)
    row_gradient = tl.load(log_sum_gradient + row, mask=in_rows, other=0.0)
    predicted_gradient = tl.zeros((PREDICTIONS, FEATURES), tl.float32)

    for first in range(0, n_candidates, CANDIDATES):
        column = first + tl.arange(0, CANDIDATES)
        in_columns = column < n_candidates
        is_positive = column < n_positives
        frame = tl.load(candidates + window * n_candidates + column, mask=in_columns, other=0)
        block = tl.load(
            scores + row[:, None] * n_candidates + column[None, :],
            mask=in_rows[:, None] & in_columns[None, :],
            other=-float("inf"),
        )
        of_positives = tl.load(
            positives_gradient + row[:, None] * n_positives + column[None, :],
            mask=in_rows[:, None] & is_positive[None, :],
            other=0.0,
        )
        of_negatives = tl.exp(block - row_log_sum[:, None]) * row_gradient[:, None]
        gradient = tl.where(is_positive[None, :], of_positives, of_negatives) * (1.0 / dim)

        vectors_at = frame[:, None] * dim + feature[None, :]
        in_vectors = in_columns[:, None] & in_dim[None, :]
        vectors = tl.load(pool + vectors_at, mask=in_vectors, other=0.0)
        predicted_gradient = tl.dot(gradient, vectors, predicted_gradient, input_precision="ieee")
        vectors_gradient = tl.dot(tl.trans(gradient), predicted, input_precision="ieee")
        tl.atomic_add(pool_gradient + vectors_at, vectors_gradient, mask=in_vectors, sem="relaxed")

    tl.store(predictions_gradient + predicted_at, predicted_gradient, mask=in_predicted)
