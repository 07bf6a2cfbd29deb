"""The encoders and decoders of Deep SAD, without bias terms.

A bias would let the network send every input to the centre with zero weights elsewhere (Ruff et al., "Deep One-Class
Classification", 2018, proposition 2). Images go through with their channels last in memory: in half the time.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.1
"""Slope of the leaky rectifiers below zero."""


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer without bias, its weights from `generator` alone."""
    layer = torch.nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
    return layer


def conv(inputs: int, outputs: int, generator: torch.Generator) -> nn.Conv2d:
    """A 5x5 convolution without bias that keeps the size."""
    layer = torch.nn.utils.skip_init(nn.Conv2d, inputs, outputs, 5, padding=2, bias=False)
    nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
    return layer


def mlp(inputs: int, hidden: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
    """Features (N, inputs) to (N, outputs) by way of one hidden layer."""
    return nn.Sequential(linear(inputs, hidden, generator), nn.LeakyReLU(SLOPE), linear(hidden, outputs, generator))


class PixelEncoder(nn.Module):
    """LeNet-like: images (N, 3, 32, 32) in 0..1 to (N, width). 32, 64, 128 maps of 5x5, halved each time."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = (3, 32, 64, 128)
        self.convs = nn.ModuleList(conv(a, b, generator) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(n, eps=1e-4, affine=False) for n in sizes[1:])
        self.out = linear(128 * 4 * 4, width, generator)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.leaky_relu(norm(layer(x)), SLOPE), 2)
        return self.out(x.flatten(1))


class PixelDecoder(nn.Module):
    """Embeddings (N, width) back to images (N, 3, 32, 32) in 0..1; only pretraining uses it."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.into = linear(width, 128 * 4 * 4, generator)
        sizes = (128, 64, 32)
        self.convs = nn.ModuleList(conv(a, b, generator) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(n, eps=1e-4, affine=False) for n in sizes[1:])
        self.out = conv(32, 3, generator)

    def forward(self, z: Tensor) -> Tensor:
        x = F.leaky_relu(self.into(z), SLOPE).view(-1, 128, 4, 4).contiguous(memory_format=torch.channels_last)
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(layer(F.interpolate(x, scale_factor=2))), SLOPE)
        return torch.sigmoid(self.out(F.interpolate(x, scale_factor=2)))
