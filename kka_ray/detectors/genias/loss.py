"""GenIAS's losses on images, each of one image: (N,)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of images (N, 3, H, W)."""
    return (x - y).square().mean((1, 2, 3))


def divergence(mean: Tensor, log_variance: Tensor, prior: float) -> Tensor:
    """Of N(mean, variance) from N(0, prior^2), (N, D) each, averaged over dimensions.

    A prior narrower than the usual N(0, 1) draws normals together, so that there is room for anomalies around them.
    """
    share = (mean.square() + log_variance.exp()) / prior**2
    return 0.5 * (share - 1 - log_variance + 2 * math.log(prior)).mean(1)


def margins(normal: Tensor, perturbed: Tensor, least: float, most: float) -> Tensor:
    """How far the errors of perturbed images (N,) leave the range from `least` to `most` above those of reconstructions
    (N,): closer they would be normal, farther they would not be plausible."""
    change = perturbed - normal
    return F.relu(least - change) + F.relu(change - most)
