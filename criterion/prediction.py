"""The prediction heads shared by both contrastive criteria, and the scoring of their predictions.

An anchor is a frame that is predicted from. There is one head per prediction step. All heads are
causal: at anchor w they see the context of frames 0 to w only.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from criterion import sampling
from criterion.custom_layers import EqualizedConv1d, EqualizedLinear, stacked_weights
from transformers import MultiOutputLayer, batched_forward, build_transformer, check_heads
from utils.misc import UserError, not_compiled, recurrent

DROPOUT = 0.5  # fraction of the predicted features dropped with --dropout
LOOP_OVER_HEADS_ON = ("cpu",)  # device types where batching all heads is no faster


class CriterionOutput(NamedTuple):
    """The return value of every criterion; n is K (plain CPC), M (CPC-CTC) or 1."""

    losses: torch.Tensor  # (1, n); training minimises their sum
    accuracies: torch.Tensor  # (1, n), fractions correct
    captured: dict  # name -> detached tensor, for each name in `capture`
    extra: Mapping = MappingProxyType({})  # name -> scalar tensor, further values to log


class ContrastiveCriterion(nn.Module):
    """Base of CPC and CPC-CTC: predict from each anchor, score against negatives.

    An anchor is a frame with at least `n_future` frames after it: of the S frames of a window,
    the first W = S - n_future are anchors. Each prediction is scored against the n_future frames
    after its anchor and against n_negatives random frames.

    n_frames: S (a transformer head must know it)
    limit_negatives: if > 0, negatives come from groups of this many windows of the batch (not
        where sequences have their own lengths)
    first_offset: a negative lies at least this many frames after its anchor
    reverse: predict the past from the future
    speaker_embedding: if > 0, the size of a learned embedding of the speaker (one of n_speakers),
        appended to the context
    cosine_scores, temperature: see `sampling.score_candidates`
    rnn_mode, dropout: see PredictionNetwork
    shared_head: a SharedPredictionNetwork instead

    Raises UserError if the dimensions don't fit together.
    """

    target = "speaker"  # the label in a `Batch` that `forward` takes
    step_name = "prediction step"  # what each entry of losses and accuracies belongs to
    has_accuracy = True
    fused_scores = False  # score with the Triton kernels where they can run

    def __init__(
        self,
        *,
        n_predictions,
        n_future,
        dim_context,
        dim_encoded,
        n_frames,
        n_negatives=128,
        limit_negatives=0,
        first_offset=1,
        reverse=False,
        speaker_embedding=0,
        n_speakers=0,
        cosine_scores=False,
        temperature=1.0,
        rnn_mode="transformer",
        shared_head=False,
        dropout=False,
    ):
        super().__init__()
        if n_frames <= n_future:
            raise UserError(
                f"--sizeWindow has {n_frames} frames of 10 ms, too few to look {n_future} frames "
                "ahead: choose a larger one, or a smaller --nPredicts (with --CPCCTC: a smaller "
                "--CPCCTCNumMatched)"
            )
        self.n_predictions = n_predictions
        self.n_future = n_future
        self.n_negatives = n_negatives
        self.limit_negatives = limit_negatives
        self.first_offset = first_offset
        self.reverse = reverse
        self.cosine_scores = cosine_scores
        self.temperature = temperature
        # The order of registration is that of the optimiser states in existing checkpoints.
        self.speakerEmb = nn.Embedding(n_speakers, speaker_embedding) if speaker_embedding else None
        sizes = (n_predictions, dim_context + speaker_embedding, dim_encoded, n_frames - n_future)
        if shared_head:
            self.wPrediction = SharedPredictionNetwork(*sizes, dropout=dropout)
        else:
            self.wPrediction = PredictionNetwork(*sizes, rnn_mode=rnn_mode, dropout=dropout)

    @property
    def n_losses(self):
        """The number of entries in its losses and accuracies."""
        return self.n_predictions

    def with_room(self, features, lengths):
        """features (B, S, ...) with at least one anchor: longer where `lengths`, (B,), are given
        and no sequence has one."""
        missing = 0 if lengths is None else self.n_future + 1 - features.size(1)
        return F.pad(features, (0, 0, 0, missing)) if missing > 0 else features

    def in_direction(self, *features):
        """Each tensor (B, S, ...), reversed in time if the criterion predicts the past."""
        return [frames.flip(1) for frames in features] if self.reverse else features

    def predict(self, context, speaker):
        """context (B, S, C), speaker (B,) -> predictions (B, W, K, E)."""
        context = context[:, : context.size(1) - self.n_future]
        if self.speakerEmb is not None:
            voice = self.speakerEmb(speaker).unsqueeze(1).expand(-1, context.size(1), -1)
            context = torch.cat([context, voice], dim=2)
        return self.wPrediction(context)

    def draw_negatives(self, sizes, device, generator, lengths):
        """sizes: B, S and W -> (B, W, N) int64, indices into the (B * S) frames of the batch."""
        options = {"device": device, "generator": generator, "first_offset": self.first_offset}
        if lengths is not None:
            sizes = (lengths, *sizes[1:])
            return sampling.draw_negatives_within(*sizes, self.n_negatives, **options)
        group = self.limit_negatives
        return sampling.draw_negatives(*sizes, self.n_negatives, group=group, **options)

    @not_compiled  # draws must not depend on --compile; nothing here to fuse
    def score_candidates(self, predictions, encoded, generator, lengths=None):
        """predictions (B, W, P, E), encoded (B, S, E) -> CandidateScores of X anchors.

        X is B * W, or with `lengths`, (B,), the number of anchors with n_future frames after them.
        """
        batch_size, n_frames = encoded.shape[:2]
        sizes, device = (batch_size, n_frames, predictions.size(1)), encoded.device
        positives = sampling.following_frames(*sizes, self.n_future, device)
        negatives = self.draw_negatives(sizes, device, generator, lengths)
        candidates = torch.cat([positives, negatives], dim=2).flatten(0, 1)
        predictions = predictions.flatten(0, 1)
        if lengths is not None:
            kept = sampling.complete_anchors(lengths, sizes[2], self.n_future)
            candidates, predictions = candidates[kept], predictions[kept]
        return sampling.score_candidates(
            encoded.flatten(0, 1),
            predictions,
            candidates,
            self.n_future,
            cosine=self.cosine_scores,
            temperature=self.temperature,
            fused=self.fused_scores,
        )


def mean_over_anchors(values):
    """values (X, ...) -> (1, ...), 0 where there is no anchor."""
    return (values.mean if len(values) else values.sum)(dim=0, keepdim=True)


class PredictionNetwork(nn.Module):
    """`n_predictions` independent heads, each (B, W, dim_context) -> (B, W, dim_encoded).

    rnn_mode: the kind of head, see build_head (None: linear); n_anchors: W, which a transformer
    head must know; dropout: drop half of the predicted features in training. Raises UserError for
    an unknown rnn_mode, or one that these dimensions don't suit.
    """

    def __init__(
        self, n_predictions, dim_context, dim_encoded, n_anchors, *, rnn_mode, dropout=False
    ):
        super().__init__()
        self.predictors = nn.ModuleList(
            build_head(rnn_mode or "linear", dim_context, dim_encoded, n_anchors)
            for _ in range(n_predictions)
        )
        self.dropout = nn.Dropout(DROPOUT if dropout else 0.0)

    def forward(self, context):
        """context (B, W, dim_context) -> predictions (B, W, n_predictions, dim_encoded)."""
        context = context.contiguous()  # once here instead of once per head
        loop = context.device.type in LOOP_OVER_HEADS_ON
        head_type = Head if loop else type(self.predictors[0])
        return self.dropout(head_type.forward_all(self.predictors, context))


class SharedPredictionNetwork(nn.Module):
    """One transformer layer with `n_predictions` outputs (`--multihead_rnn`).

    The network of Kharitonov et al., "Data augmenting contrastive learning of speech
    representations in the time domain" (2021): one attention for all predictions, so much faster
    than a transformer for each. Parameters and errors: those of PredictionNetwork with rnn_mode
    "transformer".
    """

    def __init__(self, n_predictions, dim_context, dim_encoded, n_anchors, *, dropout=False):
        super().__init__()
        check_widths("transformer", dim_context, dim_encoded)
        check_heads(dim_encoded)
        self.predictor = nn.Sequential(MultiOutputLayer(dim_encoded, n_anchors, n_predictions))
        self.dropout = nn.Dropout(DROPOUT if dropout else 0.0)

    def forward(self, context):
        """context (B, W, dim_context) -> predictions (B, W, n_predictions, dim_encoded)."""
        return self.dropout(self.predictor(context.contiguous()))


class Head:
    """One of K heads of the same type that predict different frames from the same context."""

    @staticmethod
    def forward_all(heads, context):
        """context (B, W, dim_context) -> predictions of all heads, (B, W, K, dim_encoded).

        Here in a loop over heads. Subclasses batch the matrix products of all heads, for GPUs.
        """
        return torch.stack([head(context) for head in heads], dim=2)


class FeedForwardHead(Head, nn.Module):
    """Two equalized layers with a ReLU between them."""

    def __init__(self, dim_context, dim_encoded):
        super().__init__()
        self.lin1 = EqualizedLinear(dim_context, dim_encoded)
        self.lin2 = EqualizedLinear(dim_encoded, dim_encoded)

    def forward(self, context):
        """(B, W, dim_context) -> (B, W, dim_encoded)."""
        return self.lin2(F.relu(self.lin1(context)))

    @staticmethod
    def forward_all(heads, context):
        first, second = ([getattr(head, name) for head in heads] for name in ("lin1", "lin2"))
        hidden = F.relu(F.linear(context, *stacked_weights(first)))
        hidden = hidden.flatten(0, 1).unflatten(1, (len(heads), -1)).transpose(0, 1)
        weight, bias = (tensor.unflatten(0, (len(heads), -1)) for tensor in stacked_weights(second))
        predictions = torch.baddbmm(bias.unsqueeze(1), hidden, weight.mT)
        return predictions.unflatten(1, context.shape[:2]).permute(1, 2, 0, 3)


class CausalConvolutionHead(Head, nn.Module):
    """An equalized convolution over a frame and the kernel_size - 1 frames before it."""

    def __init__(self, dim_context, dim_encoded, kernel_size):
        super().__init__()
        self.module = EqualizedConv1d(dim_context, dim_encoded, kernel_size)
        self.n_before = kernel_size - 1

    def forward(self, context):
        """(B, W, dim_context) -> (B, W, dim_encoded)."""
        return self.module(self.padded(context)).transpose(1, 2)

    def padded(self, context):
        """(B, W, dim_context) -> (B, dim_context, n_before + W)."""
        return F.pad(context.transpose(1, 2), (self.n_before, 0))

    @staticmethod
    def forward_all(heads, context):
        weight, bias = stacked_weights([head.module for head in heads])
        predictions = F.conv1d(heads[0].padded(context), weight, bias)
        return predictions.unflatten(1, (len(heads), -1)).permute(0, 3, 1, 2)


class RecurrentHead(Head):
    """A recurrent layer over the frames; returns the outputs without the last state."""

    def __init__(self, dim_context, dim_encoded):
        super().__init__(dim_context, dim_encoded, batch_first=True)

    def forward(self, context):
        """(B, W, dim_context) -> (B, W, dim_encoded)."""
        return recurrent(super().forward, context)[0]


class RNNHead(RecurrentHead, nn.RNN):
    """A plain (Elman) recurrent layer."""


class LSTMHead(RecurrentHead, nn.LSTM):
    """A long short-term memory."""


class LinearHead(Head, nn.Linear):
    """A matrix. If dim_encoded > dim_context, rows beyond dim_context start 100 times smaller."""

    def __init__(self, dim_context, dim_encoded):
        super().__init__(dim_context, dim_encoded, bias=False)
        if dim_encoded > dim_context:
            with torch.no_grad():
                self.weight[:dim_context].normal_()
                self.weight[dim_context:].normal_(std=0.01)

    @staticmethod
    def forward_all(heads, context):
        predictions = F.linear(context, torch.cat([head.weight for head in heads]))
        return predictions.unflatten(2, (len(heads), -1))


class TransformerHead(Head, nn.Sequential):
    """A causal layer with relative positions. Raises UserError if the two widths differ."""

    def __init__(self, dim_context, dim_encoded, n_anchors):
        check_widths("transformer", dim_context, dim_encoded)
        super().__init__(*build_transformer(dim_encoded, 1, n_anchors, abspos=False))

    @staticmethod
    def forward_all(heads, context):
        return batched_forward([layer for (layer,) in heads], context)


class IdentityHead(Head, nn.Identity):
    """The context itself is the prediction, as in Kreuk et al. (2020). Raises UserError if the two
    widths differ."""

    def __init__(self, dim_context, dim_encoded):
        check_widths("none", dim_context, dim_encoded)
        super().__init__()


def check_widths(rnn_mode, dim_context, dim_encoded):
    if dim_context != dim_encoded:
        raise UserError(
            f"--rnnMode {rnn_mode} can't turn {dim_context} features (--hiddenGar, plus "
            f"--speakerEmbedding) into {dim_encoded} (--hiddenEncoder): make them equal, leave "
            "out --speakerEmbedding, or choose another --rnnMode, such as linear"
        )


def build_head(rnn_mode, dim_context, dim_encoded, n_anchors):
    """The head that `rnn_mode` names: (B, W, dim_context) -> (B, W, dim_encoded)."""
    heads = {
        "transformer": partial(TransformerHead, n_anchors=n_anchors),
        "RNN": RNNHead,
        "LSTM": LSTMHead,
        "linear": LinearHead,
        "ffd": FeedForwardHead,
        "conv4": partial(CausalConvolutionHead, kernel_size=4),
        "conv8": partial(CausalConvolutionHead, kernel_size=8),
        "conv12": partial(CausalConvolutionHead, kernel_size=12),
        "none": IdentityHead,
    }
    if rnn_mode not in heads:
        raise UserError(f"--rnnMode {rnn_mode} is unknown: choose one of {', '.join(heads)}")
    return heads[rnn_mode](dim_context, dim_encoded)
