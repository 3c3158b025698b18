"""Contrastive predictive coding, and a criterion that learns nothing."""

import math

import torch.nn.functional as F
from torch import nn

from criterion.prediction import ContrastiveCriterion, CriterionOutput
from utils.misc import NO_CHANCE, Chance


class CPCCriterion(ContrastiveCriterion):
    """Tell the frame k steps ahead from random frames, for k = 1 to K = n_predictions.

    The InfoNCE loss of van den Oord et al., "Representation learning with contrastive predictive
    coding" (2018), with the heads of Riviere et al., "Unsupervised pretraining transfers well
    across languages" (2020). Other parameters: see ContrastiveCriterion.
    """

    def __init__(self, n_predictions, **common):
        super().__init__(n_predictions=n_predictions, n_future=n_predictions, **common)

    def chance(self):
        """The Chance of scores that don't depend on the frame: one of N + 1 candidates is right."""
        return Chance(math.log(self.n_negatives + 1), 1 / (self.n_negatives + 1))

    def forward(self, context, encoded, speaker, capture=frozenset(), generator=None):
        """context (B, S, C), encoded (B, S, E), speaker (B,) -> CriterionOutput with (1, K).

        capture: may hold "pred", the predictions (B, W, E, K). generator: draws the negatives
        (None: the global generator). Raises ValueError for other names to capture.
        """
        if not capture <= {"pred"}:
            raise ValueError(f"plain CPC has no {sorted(capture - {'pred'})} to capture")
        context, encoded = self.in_direction(context, encoded)
        predictions = self.predict(context, speaker)
        scores = self.score_candidates(predictions, encoded, generator)
        # Prediction k is scored against the k-th following frame only.
        positives, hits = (s.diagonal(dim1=1, dim2=2) for s in (scores.positives, scores.hits))
        losses = -F.logsigmoid(positives - scores.negatives).mean(dim=0, keepdim=True)
        captured = {"pred": predictions.detach().transpose(2, 3).float()} if capture else {}
        return CriterionOutput(losses, hits.float().mean(dim=0, keepdim=True), captured)


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
