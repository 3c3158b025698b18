"""Batches of windows, and how they get to the device."""

import functools
from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """Windows with their labels. A loader yields them on the CPU; `to` makes them ready for use."""

    waveform: torch.Tensor  # (B, 1, L) float32 in [-1, 1] after `to`, before int16 or float32
    speaker: torch.Tensor  # (B,) int64, speaker id at the first sample
    phone: torch.Tensor | None  # (B, L // 160) int64
    window: torch.Tensor  # (B,) int64, index into the epoch's plan (see BatchLoader.locate)
    continues: torch.Tensor  # (B,) bool, whether the row continues that of the last batch
    past: torch.Tensor | None = None  # (N, 1, L), see CPCModel.forward
    augmented: object = None  # before `to`: the function that augments the batch, or None

    def to(self, device):
        """The batch on `device`, the waveform in float32."""
        move = functools.partial(moved, device=torch.device(device))
        batch = self._replace(augmented=None).each(move)
        if batch.waveform.dtype == torch.int16:
            batch = batch._replace(waveform=batch.waveform.float() / 32768)
        return self.augmented(batch, move) if self.augmented else batch

    def each(self, function):
        """A Batch with `function` applied to each tensor."""
        return Batch(*(None if tensor is None else function(tensor) for tensor in self))


def moved(tensor, device):
    """`tensor` on `device`, without waiting until it is there."""
    if device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def on_device(batches, device):
    """Yield (Position, Batch) pairs with the batches on `device`.

    On CUDA, a second stream copies a batch while the device works on the previous one.
    """
    if device.type != "cuda":
        yield from ((position, batch.to(device)) for position, batch in batches)
        return
    copying, ahead = _copying_stream(device), None
    for position, batch in batches:
        copying.wait_stream(torch.cuda.current_stream())  # its freed memory may be reused here
        with torch.cuda.stream(copying):
            copied = position, batch.to(device), copying.record_event()
        if ahead:
            yield _when_copied(*ahead)
        ahead = copied
    if ahead:
        yield _when_copied(*ahead)


@functools.cache
def _copying_stream(device):
    """One for the process: PyTorch keeps a separate pool of freed memory for each stream."""
    return torch.cuda.Stream(device)


def _when_copied(position, batch, copied):
    torch.cuda.current_stream().wait_event(copied)
    return position, batch
