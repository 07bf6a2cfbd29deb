"""Mahalanobis distance with a shrunk covariance."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from kka_ray.config.models import Mahalanobis
from kka_ray.detectors.base import Detector
from kka_ray.detectors.mahalanobis.gaussian import moments, shrunk_factor
from kka_ray.features.base import Features


class MahalanobisDetector(Detector):
    """A Gaussian fitted to the pooled features of normals; anomalies are ignored."""

    ignores_anomalies: ClassVar[bool] = True

    def __init__(self, config: Mahalanobis) -> None:
        self.config = config
        self._mean = torch.empty(0)
        self._factor = torch.empty(0, 0)

    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Mean and covariance of the normals. Nothing is random here, so `seed` has no effect.

        Raises DataError if the normals are fewer than two or all equal: they have no covariance.
        """
        self._mean, covariance = moments(torch.from_numpy(normals.pooled).double())
        self._factor = shrunk_factor(covariance, self.config.shrinkage, len(normals))

    def score(self, features: Features) -> np.ndarray:
        """Mahalanobis distances; about sqrt(D) for a typical normal."""
        centred = torch.from_numpy(features.pooled).double() - self._mean
        white = torch.linalg.solve_triangular(self._factor, centred.T, upper=False)
        return white.norm(dim=0).float().numpy()

    def network(self) -> nn.Module:
        return _Distance(self._mean, self._factor)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"mean": self._mean, "factor": self._factor}, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        self._mean, self._factor = tensors["mean"], tensors["factor"]
        return self


class _Distance(nn.Module):
    """The distance in float32, as the norm of a whitened feature."""

    whitening: Tensor
    offset: Tensor

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        super().__init__()
        identity = torch.eye(len(mean), dtype=factor.dtype)
        white = torch.linalg.solve_triangular(factor, identity, upper=False)
        self.register_buffer("whitening", white.T.float().contiguous())
        self.register_buffer("offset", (white @ mean).float())

    def forward(self, pooled: Tensor) -> Tensor:
        return (pooled @ self.whitening - self.offset).norm(dim=1)
