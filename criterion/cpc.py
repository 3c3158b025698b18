"""Contrastive predictive coding, and a criterion that learns nothing."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from criterion import sampling
from criterion.prediction import ContrastiveCriterion, CriterionOutput, mean_over_anchors
from utils.misc import NO_CHANCE, Chance, not_compiled


class CPCCriterion(ContrastiveCriterion):
    """Distinguish the frame k steps ahead from random frames, for k = 1 to K = n_predictions.

    The InfoNCE loss of van den Oord et al., "Representation learning with contrastive predictive
    coding" (2018), with the heads of Riviere et al., "Unsupervised pretraining transfers well
    across languages" (2020).

    adjacent_negatives: instead of random frames, the only negative of a prediction is the frame
        before or after the one to predict, at random (Cuervo et al., "Variable-rate hierarchical
        CPC leads to acoustic unit discovery in speech", 2022)

    Other parameters: see ContrastiveCriterion.
    """

    def __init__(self, n_predictions, *, adjacent_negatives=False, **common):
        common |= {"n_negatives": 1} if adjacent_negatives else {}
        n_future = n_predictions + adjacent_negatives
        super().__init__(n_predictions=n_predictions, n_future=n_future, **common)
        self.adjacent_negatives = adjacent_negatives

    def chance(self):
        """The Chance of scores without information: one of N + 1 candidates is right."""
        return Chance(math.log(self.n_negatives + 1), 1 / (self.n_negatives + 1))

    def forward(self, context, encoded, speaker, capture=frozenset(), generator=None, lengths=None):
        """context (B, S, C), encoded (B, S, E), speaker (B,) -> CriterionOutput with (1, K).

        capture: any of "pred", the predictions (B, W, E, K); "anchor_costs", the mean loss of each
        anchor (X,). generator: draws the negatives (None: the global generator). lengths: (B,), the
        frames in each sequence (None: S). Raises ValueError for other names to capture.
        """
        if unknown := capture - {"pred", "anchor_costs"}:
            raise ValueError(f"plain CPC has no {sorted(unknown)} to capture")
        context, encoded = (self.padded_to_anchor(x, lengths) for x in (context, encoded))
        context, encoded = self.in_direction(context, encoded)
        predictions = self.predict(context, speaker)
        scores = self.score_candidates(predictions, encoded, generator, lengths)
        # Prediction k is scored against the k-th following frame only.
        positives, hits = (s.diagonal(dim1=1, dim2=2) for s in (scores.positives, scores.hits))
        costs = -F.logsigmoid(positives - scores.negatives)
        captured = {}
        if "pred" in capture:
            captured["pred"] = predictions.detach().transpose(2, 3).float()
        if "anchor_costs" in capture:
            captured["anchor_costs"] = costs.detach().mean(1)
        return CriterionOutput(mean_over_anchors(costs), mean_over_anchors(hits.float()), captured)

    def draw_negatives(self, sizes, device, generator, lengths):
        if not self.adjacent_negatives:
            return super().draw_negatives(sizes, device, generator, lengths)
        return sampling.anchor_frames(*sizes, device).unsqueeze(2)

    @not_compiled  # draws, as in the base class
    def score_candidates(self, predictions, encoded, generator, lengths=None):
        scores = super().score_candidates(predictions, encoded, generator, lengths)
        if not self.adjacent_negatives:
            return scores
        # Of all frames from the anchor (the negative so far) to the one after the last predicted.
        nearby = torch.cat(
            [scores.negatives.unsqueeze(2), scores.positives], dim=2
        )  # (X, K, K + 2)
        predicted = torch.arange(1, nearby.size(1) + 1, device=nearby.device)
        adjacent = predicted + sampling.draw_sides(nearby.shape[:2], nearby.device, generator)
        negatives = nearby.gather(2, adjacent.unsqueeze(2)).squeeze(2)
        return scores._replace(negatives=negatives, best_negative=negatives.detach())


class NoneCriterion(nn.Module):
    """The criterion of `--cpc_mode none`: nothing is predicted, so nothing is learned."""

    target = "speaker"
    step_name, has_accuracy = None, True

    def chance(self):
        return NO_CHANCE

    def forward(self, context, encoded, speaker, capture=frozenset(), generator=None):
        """Returns a loss and an accuracy of zero, both (1, 1).

        The loss is computed from the context, so that every parameter of the model has a gradient
        (of zero): optimisers and DistributedDataParallel need one.
        """
        if capture:
            raise ValueError(f"without a criterion there is no {sorted(capture)} to capture")
        zero = context[:1, :1, 0] * 0
        return CriterionOutput(zero, zero.detach().float(), {})
