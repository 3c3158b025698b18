"""What both contrastive criteria share: the heads that predict future frames, and their scoring.

Each prediction has a head of its own. All heads look at the past only: window w is predicted from
the context of frames 0 to w.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from criterion import sampling
from criterion.custom_layers import EqualizedConv1d, EqualizedLinear, joined
from transformers import build_transformer, side_by_side
from utils.misc import UserError, recurrent

DROPOUT = 0.5  # share of the predicted features dropped with --dropout
ONE_BY_ONE_ON = ("cpu",)  # types of devices on which products of all heads gain nothing


class CriterionOutput(NamedTuple):
    """What every criterion returns; n is K (plain CPC), M (CPC-CTC) or 1."""

    losses: torch.Tensor  # (1, n), their sum is what training minimises
    accuracies: torch.Tensor  # (1, n), shares of right answers
    captured: dict  # name -> detached tensor, of what was asked for


class ContrastiveCriterion(nn.Module):
    """The common part of CPC and CPC-CTC: predict from each window, score against negatives.

    A *window* is a frame to predict from: one with `n_future` frames after it, so that of S
    frames the first W = S - n_future are windows. Each of a window's predictions is scored
    with those n_future frames and with n_negatives random ones.

    n_frames: S, the length of the sequences (a transformer head must know it)
    limit_negatives: if > 0, negatives come from groups of that many sequences of the batch
    first_offset: how far after its window a negative lies at least, in frames
    reverse: predict the past from the future
    speaker_embedding: if > 0, the size of a learned vector of the speaker, one of n_speakers,
        that heads see beside the context
    rnn_mode, dropout: see PredictionNetwork

    Raises UserError for dimensions that can't work.
    """

    target = "speaker"  # the label of a batch that forward takes
    fused_scores = False  # score in kernels written for it, where they can run

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
        rnn_mode="transformer",
        dropout=False,
    ):
        super().__init__()
        if n_frames <= n_future:
            raise UserError(
                f"--sizeWindow has {n_frames} frames of 10 ms, too few to look {n_future} frames "
                "ahead: choose a longer one, or fewer --nPredicts (with --CPCCTC: a smaller "
                "--CPCCTCNumMatched)"
            )
        self.n_future = n_future
        self.n_negatives = n_negatives
        self.limit_negatives = limit_negatives
        self.first_offset = first_offset
        self.reverse = reverse
        # Registered in this order, in which optimiser states of existing checkpoints are stored.
        self.speakerEmb = nn.Embedding(n_speakers, speaker_embedding) if speaker_embedding else None
        self.wPrediction = PredictionNetwork(
            n_predictions,
            dim_context + speaker_embedding,
            dim_encoded,
            n_frames - n_future,
            rnn_mode=rnn_mode,
            dropout=dropout,
        )

    def in_direction(self, *sequences):
        """The sequences (B, S, ...), turned around in time if the criterion works in reverse."""
        return [sequence.flip(1) for sequence in sequences] if self.reverse else sequences

    def predict(self, context, speaker):
        """context (B, S, C), speaker (B,) -> predictions (B, W, K, E)."""
        context = context[:, : context.size(1) - self.n_future]
        if self.speakerEmb is not None:
            voice = self.speakerEmb(speaker).unsqueeze(1).expand(-1, context.size(1), -1)
            context = torch.cat([context, voice], dim=2)
        return self.wPrediction(context)

    @torch.compiler.disable  # its draws must not depend on --compile, and nothing is left to fuse
    def score(self, predictions, encoded, generator):
        """predictions (B, W, P, E), encoded (B, S, E) -> CandidateScores of X = B * W windows."""
        n_sequences, n_frames = encoded.shape[:2]
        sizes, device = (n_sequences, n_frames, predictions.size(1)), encoded.device
        positives = sampling.following_frames(*sizes, self.n_future, device)
        negatives = sampling.draw_negatives(
            *sizes,
            self.n_negatives,
            first_offset=self.first_offset,
            group=self.limit_negatives,
            device=device,
            generator=generator,
        )
        candidates = torch.cat([positives, negatives], dim=2).flatten(0, 1)
        return sampling.score_candidates(
            encoded.flatten(0, 1),
            predictions.flatten(0, 1),
            candidates,
            self.n_future,
            fused=self.fused_scores,
        )


class PredictionNetwork(nn.Module):
    """`n_predictions` independent heads, each (B, W, dim_context) -> (B, W, dim_encoded).

    rnn_mode names their kind, see build_head (None: linear). n_windows is W, which a transformer
    head must know. With dropout, half of the predicted features are dropped in training. Raises
    UserError for an unknown kind, or one that can't work with these dimensions.
    """

    def __init__(
        self, n_predictions, dim_context, dim_encoded, n_windows, *, rnn_mode, dropout=False
    ):
        super().__init__()
        self.predictors = nn.ModuleList(
            build_head(rnn_mode or "linear", dim_context, dim_encoded, n_windows)
            for _ in range(n_predictions)
        )
        self.dropout = nn.Dropout(DROPOUT if dropout else 0.0)

    def forward(self, context):
        """context (B, W, dim_context) -> predictions (B, W, n_predictions, dim_encoded)."""
        context = context.contiguous()  # once, not in every head
        one_by_one = context.device.type in ONE_BY_ONE_ON
        kind = Head if one_by_one else type(self.predictors[0])
        return self.dropout(kind.together(self.predictors, context))


class Head:
    """One of several alike that predict from the same context, each another frame."""

    @staticmethod
    def together(heads, context):
        """What all make of context (B, W, dim_context): (B, W, len(heads), dim_encoded).

        One after the other; subclasses do it in products that take in all heads, which suits a GPU.
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
    def together(heads, context):
        first, second = ([getattr(head, name) for head in heads] for name in ("lin1", "lin2"))
        hidden = F.relu(F.linear(context, *joined(first)))
        hidden = hidden.flatten(0, 1).unflatten(1, (len(heads), -1)).transpose(0, 1)
        weight, bias = (tensor.unflatten(0, (len(heads), -1)) for tensor in joined(second))
        predictions = torch.baddbmm(bias.unsqueeze(1), hidden, weight.mT)
        return predictions.unflatten(1, context.shape[:2]).permute(1, 2, 0, 3)


class CausalConvolutionHead(Head, nn.Module):
    """An equalized convolution over a frame and the kernel_size - 1 before it."""

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
    def together(heads, context):
        weight, bias = joined([head.module for head in heads])
        predictions = F.conv1d(heads[0].padded(context), weight, bias)
        return predictions.unflatten(1, (len(heads), -1)).permute(0, 3, 1, 2)


class RecurrentHead(Head):
    """A recurrent layer over the frames, of which the outputs are wanted and not the last state."""

    def __init__(self, dim_context, dim_encoded):
        super().__init__(dim_context, dim_encoded, batch_first=True)

    def forward(self, context):
        """(B, W, dim_context) -> (B, W, dim_encoded)."""
        return recurrent(super().forward, context)[0]


class RNNHead(RecurrentHead, nn.RNN):
    """Of plain neurons."""


class LSTMHead(RecurrentHead, nn.LSTM):
    """Of long short-term memory."""


class LinearHead(Head, nn.Linear):
    """A matrix. One that widens starts large in as many rows as it has columns, small below."""

    def __init__(self, dim_context, dim_encoded):
        super().__init__(dim_context, dim_encoded, bias=False)
        if dim_encoded > dim_context:
            with torch.no_grad():
                self.weight[:dim_context].normal_()
                self.weight[dim_context:].normal_(std=0.01)

    @staticmethod
    def together(heads, context):
        predictions = F.linear(context, torch.cat([head.weight for head in heads]))
        return predictions.unflatten(2, (len(heads), -1))


class TransformerHead(Head, nn.Sequential):
    """One causal layer with relative positions. Raises UserError unless it keeps the width."""

    def __init__(self, dim_context, dim_encoded, n_windows):
        if dim_context != dim_encoded:
            raise UserError(
                f"--rnnMode transformer can't turn {dim_context} features (--hiddenGar, plus "
                f"--speakerEmbedding) into {dim_encoded} (--hiddenEncoder): make them equal, leave "
                "out --speakerEmbedding, or choose another --rnnMode, such as linear"
            )
        super().__init__(*build_transformer(dim_encoded, 1, n_windows, abspos=False))

    @staticmethod
    def together(heads, context):
        return side_by_side([layer for (layer,) in heads], context)


def build_head(rnn_mode, dim_context, dim_encoded, n_windows):
    """A head of the kind `rnn_mode`: (B, n_windows, dim_context) -> (B, n_windows, dim_encoded)."""
    heads = {
        "transformer": partial(TransformerHead, n_windows=n_windows),
        "RNN": RNNHead,
        "LSTM": LSTMHead,
        "linear": LinearHead,
        "ffd": FeedForwardHead,
        "conv4": partial(CausalConvolutionHead, kernel_size=4),
        "conv8": partial(CausalConvolutionHead, kernel_size=8),
        "conv12": partial(CausalConvolutionHead, kernel_size=12),
    }
    if rnn_mode not in heads:
        raise UserError(f"--rnnMode {rnn_mode} is unknown: choose one of {', '.join(heads)}")
    return heads[rnn_mode](dim_context, dim_encoded)
