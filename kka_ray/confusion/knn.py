"""The evaluator that learns nothing from drawn images: distance to the nearest training normals."""

from __future__ import annotations

import numpy as np

from kka_ray.config.models import KnnEvaluator
from kka_ray.confusion.base import Evaluator
from kka_ray.errors import StageError


class Knn(Evaluator):
    """Mean cosine distance to the nearest training normals, on pooled features. Its embedding is the unit feature.

    A normal that is given several times, for its weight with evaluators that learn, is one neighbour.
    """

    def __init__(self, config: KnnEvaluator) -> None:
        self.config = config

    def pretrain(self, normals: np.ndarray, seed: int) -> None:
        """Remembers the normals; `seed` changes nothing. Raises StageError as the contract says."""
        if normals.ndim != 2 or len(normals) < 2:
            raise StageError(f"k-NN needs pooled features (N, D) of at least 2 normals, got shape {normals.shape}")
        if not np.isfinite(normals).all():
            raise StageError("the features of the training normals are not finite; look for damaged images")
        self.centre = _unit(normals).mean(axis=0)
        self._normals = _unit(np.unique(normals, axis=0))

    def train(self, anomalies: np.ndarray) -> None:
        """Does nothing."""

    def score(self, rows: np.ndarray) -> np.ndarray:
        """Mean cosine distance to the `neighbours` nearest normals (all of them where there are fewer), in 0..2."""
        similarity = _unit(rows) @ self._normals.T
        k = min(self.config.neighbours, len(self._normals))
        nearest = np.partition(similarity, -k, axis=1)[:, -k:]
        return np.clip(1 - nearest.mean(axis=1), 0, 2).astype(np.float32)

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """The unit features, float32 (N, D)."""
        return _unit(rows)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
