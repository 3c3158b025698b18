"""The convolution of the CPC encoder, as two matrix products."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class HalfOverlapConv(nn.Conv1d):
    """A convolution on channels-last tensors whose kernel spans exactly two strides.

    Neighbouring receptive fields then overlap by half, and each is two adjacent blocks of `stride`
    frames: output t is block t times the first half of the kernel plus block t + 1 times the
    second. The blocks are a view of the padded input, so nothing is unfolded and copied.
    """

    def __init__(self, channels_in, channels_out, stride, padding):
        super().__init__(channels_in, channels_out, 2 * stride, stride, padding)

    @torch.no_grad()
    def keep_halves(self):
        """Store the weight in the memory layout that `forward` uses, for short inputs at inference.

        Otherwise most of their time would go into copying the weight to this layout.
        """
        self.weight.data = self.weight.permute(2, 1, 0).contiguous().permute(2, 1, 0)

    def forward(self, x):
        """x: (B, T, channels_in) -> (B, T', channels_out)."""
        x, weight, bias = _in_autocast_dtype(x, self.weight, self.bias)
        (stride,), (padding,) = self.stride, self.padding
        padded = F.pad(x, (0, 0, padding, padding))
        n_blocks = padded.size(1) // stride
        blocks = padded[:, : n_blocks * stride].unflatten(1, (n_blocks, stride)).flatten(2)
        halves = weight.permute(2, 1, 0).reshape(2, blocks.size(2), -1)
        return _BlockPairs.apply(blocks, halves, bias)


def _in_autocast_dtype(*tensors):
    """Cast tensors as autocast does for matrix products, once, before they are expanded."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


class _BlockPairs(torch.autograd.Function):
    """Block t times the first half of a kernel plus block t + 1 times the second, plus a bias.

    blocks: (B, T + 1, K), halves: (2, K, C), bias: (C,) -> (B, T, C). Autograd would allocate a
    gradient of the size of the blocks for each of the two products and add them: on a CPU, 5 % of
    the encoder's time and a third of its memory.
    """

    @staticmethod
    def forward(ctx, blocks, halves, bias):
        ctx.save_for_backward(blocks, halves)
        first, second = halves.unsqueeze(1).expand(-1, len(blocks), -1, -1)
        return torch.baddbmm(bias, blocks[:, :-1], first).baddbmm_(blocks[:, 1:], second)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        blocks, halves = ctx.saved_tensors
        # A row of zeros after each waveform lets one product handle the whole batch.
        rows, gradients = blocks.flatten(0, 1), F.pad(gradient, (0, 0, 0, 1)).flatten(0, 1)
        halves_gradient = torch.stack([rows.T @ gradients, rows[1:].T @ gradients[:-1]])
        blocks_gradient = None
        if ctx.needs_input_grad[0]:  # not for the waveform
            blocks_gradient = gradients @ halves[0].T
            blocks_gradient[1:].addmm_(gradients[:-1], halves[1].T)
            blocks_gradient = blocks_gradient.view_as(blocks)
        return blocks_gradient, halves_gradient, gradient.sum(dim=(0, 1))
