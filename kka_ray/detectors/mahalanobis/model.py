"""Mahalanobis distance with a shrunk covariance."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from kka_ray.config.models import Mahalanobis
from kka_ray.detectors.base import Detector
from kka_ray.errors import DataError
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
        x = torch.from_numpy(normals.pooled).double()
        self._mean = x.mean(0)
        centred = x - self._mean
        covariance = centred.T @ centred / max(len(x) - 1, 1)
        trace = covariance.trace() / len(covariance)
        if trace < 1e-12:
            raise DataError(
                f"the {len(x)} normal images have no variance, so there is no Mahalanobis distance to them: "
                "give at least two different ones, or use the detector knn"
            )
        amount = self.config.shrinkage
        covariance = (1 - amount) * covariance + amount * trace * torch.eye(len(covariance), dtype=x.dtype)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            raise DataError(
                f"the covariance of {len(x)} normal images in {x.shape[1]} dimensions is singular with "
                f"shrinkage = {amount}: raise the shrinkage, for example to 0.1"
            )
        self._factor = factor

    def score(self, features: Features) -> np.ndarray:
        """Mahalanobis distances; about sqrt(D) for a typical normal."""
        centred = torch.from_numpy(features.pooled).double() - self._mean
        white = torch.linalg.solve_triangular(self._factor, centred.T, upper=False)
        return white.norm(dim=0).float().numpy()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"mean": self._mean, "factor": self._factor}, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        self._mean, self._factor = tensors["mean"], tensors["factor"]
        return self
