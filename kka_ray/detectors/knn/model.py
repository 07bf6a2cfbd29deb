"""Mean cosine distance to the nearest training normals."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from kka_ray.config.models import Knn
from kka_ray.detectors.base import Detector
from kka_ray.features.base import Features

_CHUNK = 2048


class KnnDetector(Detector):
    """k-NN on pooled features; anomalies are ignored. Scores are cosine distances, 0 to 2."""

    ignores_anomalies: ClassVar[bool] = True

    def __init__(self, config: Knn) -> None:
        self.config = config
        self._normals = torch.empty(0, 0)

    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Keeps the normals. Nothing is random here, so `seed` has no effect."""
        self._normals = torch.from_numpy(normals.pooled.astype(np.float64))

    def score(self, features: Features) -> np.ndarray:
        """Mean cosine distance to the `neighbours` nearest normals, or to all of them where there are fewer."""
        return distances(features.pooled, self._normals, self.config.neighbours)

    def network(self) -> nn.Module:
        return NearestNormals(self._normals.float(), self.config.neighbours)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"normals": self._normals.float()}, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        self._normals = tensors["normals"].double()
        return self


class NearestNormals(nn.Module):
    """`distances` in float32."""

    normals: Tensor

    def __init__(self, normals: Tensor, neighbours: int) -> None:
        super().__init__()
        self.register_buffer("normals", normals.T.contiguous())
        self.neighbours = min(neighbours, len(normals))

    def forward(self, pooled: Tensor) -> Tensor:
        nearest = (pooled @ self.normals).topk(self.neighbours, dim=1).values
        return (1 - nearest.mean(1)).clamp_min(0)


def distances(pooled: np.ndarray, normals: Tensor, neighbours: int) -> np.ndarray:
    """Mean cosine distance of unit vectors (N, D) to their nearest among `normals` (M, D), float64, as float32 (N,).

    In float64: 1 - cosine of near copies would keep few digits of float32, and they would depend on the batch. Who
    scores often keeps the normals so; what is saved of them is float32, of which they were made.
    """
    out = []
    for start in range(0, len(pooled), _CHUNK):
        cosine = torch.from_numpy(pooled[start : start + _CHUNK]).double() @ normals.T
        nearest = cosine.topk(min(neighbours, len(normals)), dim=1).values
        out.append((1 - nearest.mean(1)).clamp_min(0))
    return torch.cat(out).float().numpy()
