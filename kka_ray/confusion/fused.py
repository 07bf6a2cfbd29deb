"""Deep SAD and k-NN together: what one of them takes for a distance and the other does not counts less."""

from __future__ import annotations

import numpy as np

from kka_ray.config.models import FusedEvaluator
from kka_ray.confusion.base import Evaluator
from kka_ray.confusion.deep_sad import DeepSadEvaluator
from kka_ray.confusion.knn import Knn


class Fused(Evaluator):
    """The geometric mean of Deep SAD's and k-NN's distances, whose logarithm, as hardness reads it, is their mean.

    The embedding is Deep SAD's, which may collapse where unit features can't.
    """

    def __init__(self, config: FusedEvaluator) -> None:
        self.deep_sad, self.knn = DeepSadEvaluator(config.deep_sad), Knn(config.knn)

    def pretrain(self, normals: np.ndarray, seed: int) -> None:
        """That of both. Raises StageError as the contract says."""
        self.deep_sad.pretrain(normals, seed)
        self.knn.pretrain(normals, seed)
        self.centre = self.deep_sad.centre

    def train(self, anomalies: np.ndarray) -> None:
        """Trains Deep SAD."""
        self.deep_sad.train(anomalies)

    def score(self, rows: np.ndarray) -> np.ndarray:
        """sqrt(||phi(x) - c||^2 * mean cosine distance), float32 (N,)."""
        return np.sqrt(self.deep_sad.score(rows) * self.knn.score(rows))

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Deep SAD's phi(x), float32 (N, width)."""
        return self.deep_sad.embed(rows)
