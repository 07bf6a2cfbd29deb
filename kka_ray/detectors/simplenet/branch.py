"""One branch of SimpleNet: standardisation, linear adaptor and discriminator of one kind of feature."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kka_ray.detectors.simplenet.loss import slope

_SLOPE = 0.2
"""Of the leaky ReLU where it leaks."""
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

    def standardise(self, x: Tensor) -> Tensor:
        """Features (..., C) with the mean and deviation of normals taken out."""
        return (x - self.mean) / self.std

    def discriminate(self, z: Tensor) -> Tensor:
        """D (...) of adapted features (..., width)."""
        return self.tail(F.leaky_relu(self.hidden(z), _SLOPE)).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """D (...) of features (..., C)."""
        return self.discriminate(self.adaptor(self.standardise(x)))

    @torch.no_grad()
    def folded(self) -> Callable[[Tensor], Tensor]:
        """`forward` for scoring: standardisation, adaptor and hidden layer are linear, and are one matrix here.

        The less work the more rows there are, and the narrower they are beside `hidden`; equal to 1e-5.
        """
        adaptor = self.adaptor.weight.double() / self.std.double()
        shift = self.adaptor.bias.double() - adaptor @ self.mean.double()
        weight = (self.hidden.weight.double() @ adaptor).T.float()
        bias = (self.hidden.bias.double() + self.hidden.weight.double() @ shift).float()
        tail, last = self.tail.weight[0], self.tail.bias

        def score(x: Tensor) -> Tensor:
            h = F.leaky_relu_(torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight), _SLOPE)
            return (h @ tail + last).view(x.shape[:-1])

        return score

    @torch.no_grad()
    def set_gradients(
        self, normals: Tensor, noise: Tensor, negatives: Tensor, weights: tuple[float, float], margin: float
    ) -> None:
        """Sets the gradients of a step's loss: its sum over the rows, each times the weight of its kind.

        normals: standardised features (N, C), N >= 0. noise: (N, width), added to the adapted normals for N negatives
        of the same weight. negatives: standardised features (M, C), M >= 0. weights: of normals and of negatives.

        The loss has no slope where the margin is met, which soon are most rows. Only the others are taken back through
        the three layers, which is why this does without autograd.
        """
        count, more = len(normals), len(negatives)
        x = torch.cat([normals, negatives])
        z = self.adaptor(x)
        z = torch.cat([z, z[:count] + noise])
        row = torch.cat([torch.arange(count + more), torch.arange(count)])
        sign = torch.cat([torch.ones(count), -torch.ones(more + count)])
        weight = torch.tensor(weights).repeat_interleave(torch.tensor([count, more]))[row]
        h = self.hidden(z)
        d = slope(self.tail(F.leaky_relu(h, _SLOPE)).squeeze(-1), sign, margin) * weight
        short = d.nonzero().squeeze(1)
        d, h, z, x = d[short], h[short], z[short], x[row[short]]
        self.tail.weight.grad = d[None] @ F.leaky_relu(h, _SLOPE)
        self.tail.bias.grad = d.sum()[None]
        to_hidden = d[:, None] * self.tail.weight * torch.where(h > 0, 1.0, _SLOPE)
        self.hidden.weight.grad = to_hidden.T @ z
        self.hidden.bias.grad = to_hidden.sum(0)
        to_adaptor = to_hidden @ self.hidden.weight
        self.adaptor.weight.grad = to_adaptor.T @ x
        self.adaptor.bias.grad = to_adaptor.sum(0)

    @torch.no_grad()
    def start(
        self,
        x: Tensor,
        shrinkage: float,
        noise: float,
        margin: float,
        generator: torch.Generator,
        blocks: Sequence[int] = (),
    ) -> None:
        """Sets statistics and initial weights from normal features x (N, C), float32.

        blocks: how many channels there are of each kind, where all of a kind are measured in one unit, their mean
        deviation, as their own would magnify what normals hardly vary in; without, each has its own.

        The adaptor begins as a shrunk whitening, turned at random to its width. The hidden units begin in pairs of
        opposite sign and the tail with equal weights, so that D begins as a falling function of the L1 norm in random
        directions: an approximate Mahalanobis distance. It is scaled so that normals lie at +margin and noisy ones at
        -margin on average. From random weights, 1,000 normals are too few to find this shape.
        """
        self.mean.copy_(x.mean(0))
        std = x.std(0, correction=0)
        if blocks:
            units = [part.square().mean().sqrt().expand(len(part)) for part in std.split(list(blocks))]
            self.std.copy_(torch.cat(units).clamp_min(_MIN_STD))
        else:
            self.std.copy_(std.clamp_min(max(_STD_FLOOR * float(std.mean()), _MIN_STD)))
        x = x[torch.randperm(len(x), generator=generator)[:_COVARIANCE_ROWS]]
        self.adaptor.weight.copy_(self._whitening(self.standardise(x), shrinkage, generator))
        self.adaptor.bias.zero_()
        half, width = self.hidden.weight.shape[0] // 2, self.hidden.weight.shape[1]
        directions = torch.randn(half, width, generator=generator) / width**0.5
        self.hidden.weight.copy_(torch.cat([directions, -directions]))
        self.hidden.bias.zero_()
        self.tail.weight.fill_(-1.0)
        self.tail.bias.zero_()
        z = self.adaptor(self.standardise(x[:2000]))
        near = self.discriminate(z).mean()
        far = self.discriminate(z + noise * torch.randn(z.shape, generator=generator)).mean()
        scale = 2 * margin / (near - far)
        self.tail.weight.mul_(scale)
        self.tail.bias.fill_(float(-scale * (near + far) / 2))

    def _whitening(self, x: Tensor, shrinkage: float, generator: torch.Generator) -> Tensor:
        """A matrix (width, C) that makes x (N, C) nearly white; shrinkage bounds the directions without variance.

        With the Cholesky factor L of the shrunk covariance L^-1 x is white; a random orthonormal frame makes of it what
        it would make of any other whitening.
        """
        x = x.double()
        covariance = x.T @ x / len(x)
        mean = float(covariance.diagonal().mean())
        covariance.mul_(1 - shrinkage).diagonal().add_(shrinkage * (mean if mean > 1e-6 else 1.0))
        width = self.adaptor.weight.shape[0]
        turn = torch.randn(len(covariance), width, generator=generator, dtype=x.dtype)
        frame = torch.linalg.qr(turn)[0]
        return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance).T, frame, upper=True).T.float()
