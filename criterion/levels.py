"""Two levels trained together: a criterion for frames and one for their segments (segments.py)."""

import torch
from torch import nn

from criterion.networks import Networks
from utils.misc import OF_SEGMENTS


class LevelCriteria(nn.Module):
    """The criteria of frames (None if only segments are trained) and of segments.

    A call goes to that of frames. Both are ContrastiveCriterions; names are keys of checkpoints.
    """

    target = "speaker"
    has_accuracy = True

    def __init__(self, of_frames, of_segments):
        super().__init__()
        self.frameLevelCriterion = of_frames
        self.segmentLevelCriterion = of_segments

    def forward(self, *arguments, **options):
        return self.frameLevelCriterion(*arguments, **options)

    def of_both(self, frames, segments, speaker, generator, capture=frozenset()):
        """The CriterionOutput of each level, frames first.

        frames: (context, encoded), see ContrastiveCriterion; segments: the Segments of these;
        capture: names to capture from the segment level
        """
        outputs = []
        if self.frameLevelCriterion is not None:
            outputs.append(self.frameLevelCriterion(*frames, speaker, generator=generator))
        vectors, options = segments[:2], {"generator": generator, "lengths": segments.lengths}
        return [*outputs, self.segmentLevelCriterion(*vectors, speaker, capture, **options)]

    @property
    def levels(self):
        """The criteria in use, frames first."""
        both = (self.frameLevelCriterion, self.segmentLevelCriterion)
        return [criterion for criterion in both if criterion is not None]

    @property
    def step_name(self):
        names = {"prediction step": "predicted segment", "matched frame": "matched segment"}
        name = self.levels[0].step_name
        return name if self.frameLevelCriterion is not None else names[name]

    def chance(self):
        return self.levels[0].chance()

    def compile(self, **options):
        """Compile the frame criterion only: the number of segments varies from batch to batch."""
        if self.frameLevelCriterion is not None:
            self.frameLevelCriterion.fused_scores = True
            self.frameLevelCriterion.compile(**options)


class LevelNetworks(Networks):
    """Two levels as one module. Losses and accuracies of frames come before those of segments.

    criterion: LevelCriteria; model: MultiLevelModel; weights: one per level. The total is the mean
    over levels of the weighted mean of each level's losses, as in hCPC.
    """

    def __init__(self, criterion, model, weights):
        super().__init__(criterion, model)
        levels = criterion.levels
        parts = [
            torch.full((1, level.n_losses), weight / level.n_losses / len(levels))
            for level, weight in zip(levels, weights[-len(levels) :], strict=True)
        ]
        self.register_buffer("loss_weights", torch.cat(parts, dim=1), persistent=False)

    def forward(self, batch, generator=None):
        """A `Batch` -> losses and accuracies, (1, n) each."""
        frames, segments = self.both_levels(batch)
        outputs = self.criterion.of_both(frames, segments, batch.speaker, generator)
        losses, accuracies, *_ = zip(*outputs, strict=True)
        return torch.cat(losses, dim=1), torch.cat(accuracies, dim=1)

    def both_levels(self, batch):
        """Frame features and the Segments; in training, each window has at least as many segments
        as one anchor needs."""
        least = self.criterion.segmentLevelCriterion.n_future + 1 if self.training else 1
        return self.model.both_levels(batch.waveform, batch.continues, least=least)

    def total(self, losses):
        return (losses * self.loss_weights).sum()

    def by_level(self, row):
        n = self.criterion.levels[0].n_losses
        return {"": row[:n], OF_SEGMENTS: row[n:]} if row[n:] else {"": row}


def freeze_unreached(criterion, model, args):
    """Freeze the parameters that no loss reaches."""
    if args.freezeFrameModel:
        model.freeze_frames()
    elif criterion.frameLevelCriterion is None and not args.segmentOnContext:
        model.frameLevelModel.gAR.requires_grad_(False)
