"""Gaussians with a shrunk covariance, one or many."""

from __future__ import annotations

import torch
from torch import Tensor

from kka_ray.errors import DataError


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of x (N, D); the covariance of one row is 0."""
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / max(len(x) - 1, 1)


def shrunk_factor(covariance: Tensor, shrinkage: float, count: int) -> Tensor:
    """Lower Cholesky factors of covariances (..., D, D) of `count` rows, each shrunk towards the mean variance of all.

    (1 - shrinkage) S + shrinkage t I, t the mean of all variances: a place where nothing varies keeps a distance.
    Raises DataError if nothing varies at all, or if a covariance is singular in spite of the shrinkage.
    """
    size = covariance.shape[-1]
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean()
    if mean < 1e-12:
        raise DataError(
            f"the {count} normal images have no variance, so there is no Mahalanobis distance to them: "
            "give at least two different ones, or use the detector knn"
        )
    shrunk = (1 - shrinkage) * covariance + shrinkage * mean * torch.eye(size, dtype=covariance.dtype)
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    if failed.any():
        raise DataError(
            f"the covariance of {count} normal images in {size} dimensions is singular with "
            f"shrinkage = {shrinkage}: raise the shrinkage, for example to 0.1"
        )
    return factor.contiguous()  # as it will be after saving and loading
