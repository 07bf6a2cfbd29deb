"""Features on the scale of the normals."""

from __future__ import annotations

from typing import Literal

import numpy as np

_SHRINKAGE = 0.1


class Whitening:
    """Features to principal components of the normals, at unit scale: (N, D) to float32 (N, K).

    Variances are shrunk towards the mean variance: what is rare among normals then weighs as much as what varies widely
    among them.
    """

    def __init__(self, mean: np.ndarray, projection: np.ndarray) -> None:
        self.mean, self.projection = mean, projection

    @classmethod
    def of(cls, normals: np.ndarray, components: int | Literal["all"] | None) -> Whitening:
        """Of normals (N, D), N >= 2, keeping the first `components`, at most N - 1.

        `all` keeps D, those as well along which these normals do not vary: there others may differ. None keeps the
        features' own axes.
        """
        x = normals.astype(np.float64)
        mean = x.mean(axis=0)
        covariance = np.cov(x, rowvar=False, bias=True).reshape(x.shape[1], x.shape[1])
        if components is None:
            axes, variances = np.eye(x.shape[1]), np.diag(covariance)
        else:
            keep = x.shape[1] if components == "all" else min(components, x.shape[1], len(x) - 1)
            values, vectors = np.linalg.eigh(covariance)
            axes, variances = vectors[:, ::-1][:, :keep], values[::-1][:keep]
        scale = np.sqrt(np.maximum(variances, 0) + _SHRINKAGE * np.trace(covariance) / x.shape[1])
        # Normals that do not vary beyond rounding have no scale: they all become the same point, and that shows.
        usable = scale > 1e-6 * np.sqrt(np.square(x).sum(axis=1).mean())
        # In the layout that it has after saving and loading: products round the same.
        return cls(mean, np.ascontiguousarray(axes * np.where(usable, 1 / np.where(usable, scale, 1), 0)))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return ((rows - self.mean) @ self.projection).astype(np.float32)
