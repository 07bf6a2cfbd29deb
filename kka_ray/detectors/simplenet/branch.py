"""One branch of SimpleNet: standardisation, linear adaptor and discriminator of one kind of feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STD_FLOOR = 0.05
"""Least deviation of a channel, as a share of the mean deviation: channels that normals never use stay bounded."""
_MIN_STD = 1e-3
_COVARIANCE_ROWS = 50_000


class Branch(nn.Module):
    """D(x) = tail(leaky_relu(hidden(adaptor((x - mean) / std)))): positive for normals, negative for anomalies.

    Parameters are empty until `start` or `load_state_dict`; no global random state is used.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, width: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.adaptor = nn.utils.skip_init(nn.Linear, channels, width)
        self.hidden = nn.utils.skip_init(nn.Linear, width, hidden)
        self.tail = nn.utils.skip_init(nn.Linear, hidden, 1)

    def adapt(self, x: Tensor) -> Tensor:
        """Features (..., C) in the adapted space (..., width)."""
        return self.adaptor((x - self.mean) / self.std)

    def discriminate(self, z: Tensor) -> Tensor:
        """D (...) of adapted features (..., width)."""
        return self.tail(F.leaky_relu(self.hidden(z), 0.2)).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """D (...) of features (..., C)."""
        return self.discriminate(self.adapt(x))

    @torch.no_grad()
    def start(self, x: Tensor, shrinkage: float, noise: float, margin: float, generator: torch.Generator) -> None:
        """Sets statistics and initial weights from normal features x (N, C), float32.

        The adaptor begins as a shrunk whitening, turned at random to its width. The hidden units begin in pairs of
        opposite sign and the tail with equal weights, so that D begins as a falling function of the L1 norm in random
        directions: an approximate Mahalanobis distance. It is scaled so that normals lie at +margin and noisy ones at
        -margin on average. From random weights, 1,000 normals are too few to find this shape.
        """
        self.mean.copy_(x.mean(0))
        std = x.std(0, correction=0)
        self.std.copy_(std.clamp_min(max(_STD_FLOOR * float(std.mean()), _MIN_STD)))
        x = x[torch.randperm(len(x), generator=generator)[:_COVARIANCE_ROWS]]
        self.adaptor.weight.copy_(self._whitening((x - self.mean) / self.std, shrinkage, generator))
        self.adaptor.bias.zero_()
        half, width = self.hidden.weight.shape[0] // 2, self.hidden.weight.shape[1]
        directions = torch.randn(half, width, generator=generator) / width**0.5
        self.hidden.weight.copy_(torch.cat([directions, -directions]))
        self.hidden.bias.zero_()
        self.tail.weight.fill_(-1.0)
        self.tail.bias.zero_()
        z = self.adapt(x[:2000])
        near = self.discriminate(z).mean()
        far = self.discriminate(z + noise * torch.randn(z.shape, generator=generator)).mean()
        scale = 2 * margin / (near - far)
        self.tail.weight.mul_(scale)
        self.tail.bias.fill_(float(-scale * (near + far) / 2))

    def _whitening(self, x: Tensor, shrinkage: float, generator: torch.Generator) -> Tensor:
        """A matrix (width, C) that makes x (N, C) nearly white; shrinkage bounds the directions without variance."""
        x = x.double()
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        mean = float(values.mean())
        shrunk = (1 - shrinkage) * values.clamp_min(0) + shrinkage * (mean if mean > 1e-6 else 1.0)
        white = (vectors / shrunk.sqrt()) @ vectors.T
        width = self.adaptor.weight.shape[0]
        if width < len(white):
            turn = torch.randn(len(white), width, generator=generator, dtype=torch.float64)
            white = white @ torch.linalg.qr(turn)[0]
        return white.T.float()
