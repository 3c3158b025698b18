"""Dropout for training that is faster than PyTorch's on a CPU.

There, PyTorch draws one number per element, which takes as long as the surrounding matrix products.
Here an element needs only 16 random bits, and the generator yields 64 at a time. On other devices,
and when compiled, PyTorch's own dropout is used.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def dropout(x, p):
    """Zero a fraction `p` of the elements of `x` and scale up the others, as in training."""
    return _Dropout.apply(x, p) if _draws_bits(x) else F.dropout(x, p)


def relu_with_dropout_(x, p, training):
    """In-place ReLU, with dropout in training."""
    if training and _draws_bits(x):
        return _ReLUWithDropout.apply(x, p)
    return F.relu(F.dropout(x, p, training, inplace=True), inplace=True)


def _draws_bits(x):
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _draw(x, p):
    """The boolean mask of elements that dropout keeps, and the factor that rescales them."""
    n_values = 2**16
    n_dropped = round(p * n_values)
    draws = torch.randint(-(2**63), 2**63 - 1, (x.numel() // 4 + 1,)).view(torch.int16)
    kept = draws[: x.numel()].view(x.shape) >= n_dropped - n_values // 2
    return kept, n_values / (n_values - n_dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        kept, ctx.factor = _draw(x, p)
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.factor), None


class _ReLUWithDropout(torch.autograd.Function):
    """In place. An output of 0 was dropped or negative, so backward needs only the output."""

    @staticmethod
    def forward(ctx, x, p):
        kept, ctx.factor = _draw(x, p)
        ctx.mark_dirty(x.mul_(kept).relu_().mul_(ctx.factor))
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, output, 0).mul_(ctx.factor), None
