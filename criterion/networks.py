"""Everything that is trained, as one module."""

from torch import nn

from utils.misc import Progress


class Networks(nn.Module):
    """The criterion and the model: what the optimiser, DistributedDataParallel and CUDA graphs see.

    Registered in this order, which is that of the optimiser states in checkpoints.
    """

    def __init__(self, criterion, model):
        super().__init__()
        self.criterion = criterion
        self.model = model
        self.progress = Progress  # a function that returns the Progress of training; see RunState

    def forward(self, batch, generator=None):
        """A `Batch` -> losses and accuracies, (1, n) each; see CriterionOutput.

        generator: draws the negatives (None: the global generator).
        """
        context, encoded = self.model(batch.waveform, batch.continues, batch.past)
        label = getattr(batch, self.criterion.target)
        output = self.criterion(context, encoded, label, generator=generator)
        return output.losses, output.accuracies

    def total(self, losses):
        """The loss that training minimises, a scalar, from the `losses` (1, n)."""
        return losses.sum()

    def by_level(self, row):
        """Suffix of names in the logs -> the part of `row` (a list of n values) that has it."""
        return {"": row}

    def named(self, part, losses, accuracies):
        """Means, two lists of n numbers, by their names in the logs; part: "train" or "val"."""
        return {
            f"{kind}_{part}{suffix}": values
            for kind, row in (("locLoss", losses), ("locAcc", accuracies))
            for suffix, values in self.by_level(row).items()
        }

    @property
    def step_name(self):
        """The unit that has one of the n losses: "prediction step", "matched frame", or None."""
        return self.criterion.step_name

    @property
    def chance(self):
        """The Chance (utils/misc.py) of the criterion."""
        return self.criterion.chance()

    @property
    def has_accuracy(self):
        """Whether accuracies are meaningful; for CTC phone recognition they are always 0."""
        return self.criterion.has_accuracy
