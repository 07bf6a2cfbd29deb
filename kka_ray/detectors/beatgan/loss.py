"""BEAT-GAN's losses on images, each a sum over a worker's part of a batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Cross-entropy of the logits (N, 1) of images, to be told from those of their reconstructions."""
    return F.softplus(-real).sum() + F.softplus(fake).sum()


def errors(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean squared difference of each image, (N,)."""
    return (x - reconstruction).square().mean((1, 2, 3))


def relative_inverse(error: float, anomalous: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of error / e, of the errors e (M,) of anomalies and the mean error of normals.

    The inverse, as in Deep SAD, pushes hardest where an anomaly is reconstructed as well as a normal and fades beyond.
    """
    return (weights * error / anomalous.clamp_min(1e-6)).sum()
