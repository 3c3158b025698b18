"""Layers whose weights keep the same scale whatever their width.

Equalized learning rate of Karras et al., "Progressive growing of GANs" (2018): weights are drawn
from N(0, 1) and scaled at run time instead of at initialisation, so that an optimiser that
normalises gradients (Adam) moves all of them equally fast in proportion to their size.
"""

import math

import torch
from torch import nn


class Equalized(nn.Module):
    """Any layer with a weight and a bias, its output scaled by sqrt(2 / fan-in)."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        nn.init.normal_(module.weight)
        nn.init.zeros_(module.bias)
        self.gain = math.sqrt(2 / module.weight[0].numel())

    def forward(self, x):
        return self.module(x) * self.gain


class EqualizedLinear(Equalized):
    """(..., dim_in) -> (..., dim_out)."""

    def __init__(self, dim_in, dim_out):
        super().__init__(nn.Linear(dim_in, dim_out))


class EqualizedConv1d(Equalized):
    """(B, dim_in, S) -> (B, dim_out, S - kernel_size + 1)."""

    def __init__(self, dim_in, dim_out, kernel_size):
        super().__init__(nn.Conv1d(dim_in, dim_out, kernel_size))


def stacked_weights(layers):
    """Weights and biases of equal-sized layers times their gain, concatenated over outputs."""
    weights = torch.cat([layer.module.weight for layer in layers])
    biases = torch.cat([layer.module.bias for layer in layers])
    return weights * layers[0].gain, biases * layers[0].gain
