"""Scores of candidates in Triton kernels, for GPUs.

They compute the same as `sampling._ChunkedScores`, which is the version to read first and the
reference in the tests. There, the candidates of a few hundred anchors are written to memory and
read by a matrix product, then again, with gradients, in the backward pass. Here, each vector
goes from the pool, which fits a GPU's L2 cache (1 kB per frame with the defaults), directly to the
multiprocessor that needs it, and only scores are written. Gradients of the pool are summed by
atomic additions in varying order: their last bits differ from run to run.

A program of the forward pass scores one anchor; a program of the backward pass handles one anchor
and one block of features. Scores are kept for the backward pass: K floats per candidate take little
memory beside the K predictions, and let each block of features be differentiated on its own.

Triton compiles the kernels at their first launch, for the given sizes, so launch them once before
capturing a CUDA graph. Nothing here synchronises with the GPU or auto-tunes.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

# Blocks of the matrix products. Compiled for an H100, 256 features and up to 16 predictions, the
# forward kernel takes about 130 registers per thread and 12 kB of shared memory, the backward
# kernel about 170 and 21 kB: nothing spills, and a multiprocessor runs 15 or 6 programs at once.
# One warp for blocks of 16 x 32, two for 16 x 64, give each thread 4 x 4 products: it uses each
# value that it reads from shared memory, the bottleneck, four times.
CANDIDATES_AT_ONCE = 32
FEATURES_FORWARD, WARPS_FORWARD = 32, 1
FEATURES_BACKWARD, WARPS_BACKWARD = 64, 2
SMALLEST_BLOCK = 16  # smallest size that tl.dot takes


class FusedScores(torch.autograd.Function):
    """Like `sampling._ChunkedScores`, in float32 only. Indices are not checked."""

    @staticmethod
    def forward(ctx, pool, predictions, candidates, n_positives):
        pool, predictions = pool.contiguous(), predictions.contiguous()
        candidates = candidates.contiguous()
        n_anchors, n_predictions, _ = predictions.shape
        scores = predictions.new_empty(n_anchors, n_predictions, candidates.size(1))
        log_sum = predictions.new_empty(n_anchors, n_predictions)
        best = torch.empty_like(log_sum)
        place = torch.empty_like(log_sum, dtype=torch.int64)
        blocks = _blocks(n_predictions, FEATURES_FORWARD, WARPS_FORWARD)
        with torch.cuda.device_of(pool):
            _score_anchor[(n_anchors,)](
                *(pool, predictions, candidates, scores, log_sum, best, place),
                *(n_predictions, candidates.size(1), n_positives, pool.size(1)),
                **blocks,
            )
        ctx.save_for_backward(pool, predictions, candidates, scores, log_sum)
        ctx.mark_non_differentiable(best, place)
        return scores[..., :n_positives].clone(), log_sum, best, place

    @staticmethod
    @once_differentiable
    def backward(ctx, positives_gradient, log_sum_gradient, *_):
        pool, predictions, candidates, scores, log_sum = ctx.saved_tensors
        n_anchors, n_predictions, dim = predictions.shape
        pool_gradient = torch.zeros_like(pool)
        predictions_gradient = torch.empty_like(predictions)
        blocks = _blocks(n_predictions, FEATURES_BACKWARD, WARPS_BACKWARD)
        with torch.cuda.device_of(pool):
            _differentiate_anchor[(n_anchors, triton.cdiv(dim, FEATURES_BACKWARD))](
                *(pool, predictions, candidates, scores, log_sum),
                *(positives_gradient.contiguous(), log_sum_gradient.contiguous()),
                *(pool_gradient, predictions_gradient),
                *(n_predictions, candidates.size(1), positives_gradient.size(2), dim),
                **blocks,
            )
        return pool_gradient, predictions_gradient, None, None


def _blocks(n_predictions, n_features, n_warps):
    """Block sizes of a kernel; more predictions get more warps, so that registers suffice."""
    predictions = max(SMALLEST_BLOCK, triton.next_power_of_2(n_predictions))
    return {
        "PREDICTIONS": predictions,
        "CANDIDATES": CANDIDATES_AT_ONCE,
        "FEATURES": n_features,
        "num_warps": n_warps * predictions // SMALLEST_BLOCK,
    }


# In the kernels, tensors are contiguous and offsets into them have 64 bits. Sizes are those of
# `score_candidates`. PREDICTIONS, CANDIDATES and FEATURES are block sizes; entries past the end of
# a tensor are read as zero (predictions, vectors) or as -inf (scores of negatives).


@triton.jit
def _score_anchor(
    pool,  # (F, E)
    predictions,  # (X, K, E)
    candidates,  # (X, C)
    scores,  # (X, K, C), written
    log_sum,  # (X, K), written
    best,  # (X, K), written
    place,  # (X, K) int64, written
    n_predictions: tl.constexpr,
    n_candidates: tl.constexpr,
    n_positives: tl.constexpr,
    dim: tl.constexpr,
    PREDICTIONS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Scores of an anchor's candidates; log-sum-exp, maximum and its place over its negatives."""
    anchor = tl.program_id(0).to(tl.int64)
    prediction = tl.arange(0, PREDICTIONS)
    row = anchor * n_predictions + prediction
    in_rows = prediction < n_predictions
    # Finite, since a block that holds positives only would compute -inf - -inf.
    highest = tl.full((PREDICTIONS,), -3e38, tl.float32)
    highest_at = tl.full((PREDICTIONS,), n_positives, tl.int32)
    total = tl.zeros((PREDICTIONS,), tl.float32)  # of exp(score - highest)

    for first in range(0, n_candidates, CANDIDATES):
        column = first + tl.arange(0, CANDIDATES)
        in_columns = column < n_candidates
        frame = tl.load(candidates + anchor * n_candidates + column, mask=in_columns, other=0)
        products = tl.zeros((PREDICTIONS, CANDIDATES), tl.float32)
        for first_feature in range(0, dim, FEATURES):
            feature = first_feature + tl.arange(0, FEATURES)
            in_dim = feature < dim
            predicted = tl.load(
                predictions + row[:, None] * dim + feature[None, :],
                mask=in_rows[:, None] & in_dim[None, :],
                other=0.0,
            )
            vectors_at = frame[None, :] * dim + feature[:, None]
            in_vectors = in_columns[None, :] & in_dim[:, None]
            vectors = tl.load(pool + vectors_at, mask=in_vectors, other=0.0)
            products = tl.dot(predicted, vectors, products, input_precision="ieee")
        block = products * (1.0 / dim)
        scores_at = row[:, None] * n_candidates + column[None, :]
        tl.store(scores + scores_at, block, mask=in_rows[:, None] & in_columns[None, :])
        is_negative = in_columns & (column >= n_positives)
        block = tl.where(is_negative[None, :], block, -float("inf"))
        best_in_block, at = tl.max(block, axis=1, return_indices=True)
        highest_at = tl.where(best_in_block > highest, first + at, highest_at)
        higher = tl.maximum(highest, best_in_block)
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(block - higher[:, None]), axis=1)
        highest = higher

    tl.store(log_sum + row, highest + tl.log(total), mask=in_rows)
    tl.store(best + row, highest, mask=in_rows)
    tl.store(place + row, (highest_at - n_positives).to(tl.int64), mask=in_rows)


@triton.jit
def _differentiate_anchor(
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
    """Gradients of an anchor's predictions and candidates, for a block of features."""
    anchor = tl.program_id(0).to(tl.int64)
    prediction = tl.arange(0, PREDICTIONS)
    row = anchor * n_predictions + prediction
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
        frame = tl.load(candidates + anchor * n_candidates + column, mask=in_columns, other=0)
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
