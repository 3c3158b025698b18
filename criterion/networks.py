"""Everything that is trained, as one module."""

from torch import nn


class Networks(nn.Module):
    """The criterion and the model: what the optimiser, DistributedDataParallel and CUDA graphs see.

    Registered in this order, which is that of the optimiser states in checkpoints.
    """

    def __init__(self, criterion, model):
        super().__init__()
        self.criterion = criterion
        self.model = model

    def forward(self, batch, generator=None):
        """A `Batch` -> losses and accuracies, (1, n) each; see CriterionOutput.

        generator: draws the negatives (None: the global generator).
        """
        context, encoded = self.model(batch.waveform, batch.continues, batch.past)
        label = getattr(batch, self.criterion.target)
        output = self.criterion(context, encoded, label, generator=generator)
        return output.losses, output.accuracies

    @property
    def step_name(self):
        """What each of the n losses belongs to: "prediction step", "matched frame", or None."""
        return self.criterion.step_name

    @property
    def chance(self):
        """The Chance (utils/misc.py) of the criterion."""
        return self.criterion.chance()

    @property
    def has_accuracy(self):
        """Whether accuracies mean anything; those of CTC phone recognition are always 0."""
        return self.criterion.has_accuracy
