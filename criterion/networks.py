"""The module that is trained: criterion and model."""

import torch


class Networks(torch.nn.Module):
    """Everything that is trained: the criterion, then the model (the original's order).

    One forward pass is what an optimiser, a compiler and data parallelism see.
    """

    def __init__(self, criterion, model):
        super().__init__()
        self.criterion = criterion
        self.model = model

    def forward(self, batch, generator=None):
        """A `Batch` -> losses and accuracies, (1, n) each, one for each prediction step."""
        context, encoded = self.model(batch.waveform, batch.continues)
        label = getattr(batch, self.criterion.target)
        output = self.criterion(context, encoded, label, generator=generator)
        return output.losses, output.accuracies

    @property
    def step_name(self):
        """The meaning of each entry in a row of losses; None where a row has one."""
        return self.criterion.step_name

    @property
    def has_accuracy(self):
        """Whether the accuracies mean anything."""
        return self.criterion.has_accuracy
