"""Copying batches to the device."""

import functools

import torch


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
    """The process's only one: PyTorch keeps freed memory apart for each stream."""
    return torch.cuda.Stream(device)


def _when_copied(position, batch, copied):
    torch.cuda.current_stream().wait_event(copied)
    return position, batch
