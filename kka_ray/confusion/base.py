"""The contract of a confusion evaluator, and how its embeddings are checked for collapse."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

COLLAPSED = 1e-6
"""Relative variance (see `relative_variance`) from which down an embedding counts as collapsed."""


class Evaluator(ABC):
    """Scores images by their distance to the normals; larger is further away.

    Rows are pooled features, float (N, D), or pixels, uint8 (N, 32, 32, 3), as the configuration's `input` says
    (`confusion.judge.rows` makes them). Fitting has two parts, because the first is the same for every fold of a
    cross-fitting: `pretrain` sees normals only, `train` sees the labelled anomalies as well.
    """

    centre: np.ndarray
    """The centre of the normals in the embedding, float32 (width,); there after `pretrain`."""

    @abstractmethod
    def pretrain(self, normals: np.ndarray, seed: int) -> None:
        """All that does not depend on anomalies. Deterministic given the seed and the thread count.

        Raises StageError for fewer than two normals, or for rows of a wrong shape or that are not finite.
        """

    @abstractmethod
    def train(self, anomalies: np.ndarray) -> None:
        """Goes on from `pretrain` with labelled anomalies; none (0 rows) makes a one-class evaluator."""

    def fit(self, normals: np.ndarray, anomalies: np.ndarray, seed: int) -> None:
        """`pretrain` and `train`."""
        self.pretrain(normals, seed)
        self.train(anomalies)

    @abstractmethod
    def score(self, rows: np.ndarray) -> np.ndarray:
        """Distances, float32 (N,), >= 0, finite."""

    @abstractmethod
    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, width)."""


def relative_variance(embeddings: np.ndarray, centre: np.ndarray) -> float:
    """Variance of embeddings (N, width), summed over dimensions, in units of the centre's squared length.

    A map that sends everything to one point has 0, whatever its scale.
    """
    power = float(np.square(centre, dtype=np.float64).sum())
    return float(embeddings.astype(np.float64).var(axis=0).sum()) / max(power, 1e-12)
