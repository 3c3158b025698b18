"""Contrastive predictive coding, and the criterion of a run that learns nothing."""

import torch
import torch.nn.functional as F
from torch import nn

from criterion.prediction import ContrastiveCriterion, CriterionOutput


class CPCCriterion(ContrastiveCriterion):
    """Tell the frame k steps ahead from random frames, for k = 1 to n_predictions.

    The InfoNCE loss of van den Oord et al., "Representation learning with contrastive predictive
    coding" (2018), with the heads of Riviere et al., "Unsupervised pretraining transfers well
    across languages" (2020). Other parameters: see ContrastiveCriterion.
    """

    def __init__(self, n_predictions, **common):
        super().__init__(n_predictions=n_predictions, n_future=n_predictions, **common)

    def forward(self, context, encoded, speaker, capture=frozenset(), generator=None):
        """context (B, S, C), encoded (B, S, E), speaker (B,) -> CriterionOutput with (1, K).

        capture: may hold "pred", the predictions (B, W, E, K). generator: where negatives come
        from (None: the global generator). Raises ValueError for other things to capture.
        """
        if not capture <= {"pred"}:
            raise ValueError(f"plain CPC has no {sorted(capture - {'pred'})} to capture")
        context, encoded = self.in_direction(context, encoded)
        predictions = self.predict(context, speaker)
        scores = self.score_candidates(predictions, encoded, generator)
        # Prediction k is for frame k of those that follow, and no other.
        positives, best_negative = scores.positives.diagonal(dim1=1, dim2=2), scores.best_negative
        losses = -F.logsigmoid(positives - scores.negatives).mean(dim=0, keepdim=True)
        # A negative may be the right frame itself, its score a rounding error apart: not a mistake.
        hits = (positives > best_negative) | torch.isclose(positives, best_negative)
        captured = {"pred": predictions.detach().transpose(2, 3).float()} if capture else {}
        return CriterionOutput(losses, hits.float().mean(dim=0, keepdim=True), captured)


class NoneCriterion(nn.Module):
    """The criterion of `--cpc_mode none`: nothing to predict, so nothing is learned."""

    target = "speaker"

    def forward(self, context, encoded, speaker, capture=frozenset(), generator=None):
        """Returns a loss and an accuracy of zero, both (1, 1).

        The loss depends on the context, so that its gradient, which is zero, reaches every
        parameter of the model: optimisers and DistributedDataParallel count on that.
        """
        if capture:
            raise ValueError(f"without a criterion there is no {sorted(capture)} to capture")
        zero = context[:1, :1, 0] * 0
        return CriterionOutput(zero, zero.detach().float(), {})
