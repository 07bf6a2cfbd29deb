"""What the heads share: they need anomalies, and are fused with k-NN."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from kka_ray.detectors.base import Detector
from kka_ray.detectors.knn.model import NearestNormals, distances
from kka_ray.features.base import Features
from kka_ray.features.robust import Robust


class Head(Detector):
    """A head alone, or plus k-NN, each standardised on validation normals."""

    needs_anomalies: ClassVar[bool] = True

    def __init__(self, kind: str, fused: bool, neighbours: int) -> None:
        self._kind, self._fused, self._neighbours = kind, fused, neighbours
        self._normals = torch.empty(0, 0)
        self._scales: dict[str, Robust] = {}

    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Fits the head to normals and anomalies and their views. Raises ValueError without anomalies."""
        if anomalies is None or len(anomalies) == 0:
            raise ValueError(f"the detector {self._kind} learns from anomalies and was given none")
        labelled = anomalies.with_views()
        weights = labelled.relative_weights().astype(np.float64)
        self._fit_head(normals.with_views().pooled, labelled.pooled, weights, seed)
        if self._fused:
            self._normals = torch.from_numpy(normals.pooled.astype(np.float64))
            self._scales = {name: Robust.of(s) for name, s in self._parts(validation).items()}

    @abstractmethod
    def _fit_head(self, normals: np.ndarray, anomalies: np.ndarray, weights: np.ndarray, seed: int) -> None:
        """Fits to unit features of normals (N, D) and anomalies (M, D), M >= 1, with weights (M,) of mean 1."""

    @abstractmethod
    def _head(self, pooled: np.ndarray) -> np.ndarray:
        """Scores (N,) of unit features (N, D)."""

    @abstractmethod
    def _module(self) -> nn.Module:
        """`_head` in float32, for export."""

    @abstractmethod
    def _head_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `state`, of the head alone."""

    @abstractmethod
    def _restore_head(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """The inverse of `_head_state`."""

    def score(self, features: Features) -> np.ndarray:
        """Alone: the head's own score. Fused: a sum of two values in MADs of the normals."""
        parts = self._parts(features)
        if not self._fused:
            return parts["head"].astype(np.float32)
        return sum(self._scales[name](s) for name, s in parts.items()).astype(np.float32)  # type: ignore[union-attr]

    def network(self) -> nn.Module:
        if not self._fused:
            return self._module()
        return _Fused(self._module(), NearestNormals(self._normals.float(), self._neighbours), self._scales)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = self._head_state()
        if self._fused:
            tensors = tensors | {"normals": self._normals.float()}
        return tensors, values | {"scales": {name: asdict(s) for name, s in self._scales.items()}}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        self._restore_head(tensors, values)
        if self._fused:
            self._normals = tensors["normals"].double()
        self._scales = {name: Robust(**s) for name, s in values["scales"].items()}
        return self

    def _parts(self, features: Features) -> dict[str, np.ndarray]:
        parts = {"head": self._head(features.pooled)}
        if self._fused:
            parts["knn"] = distances(features.pooled, self._normals, self._neighbours)
        return parts


class _Fused(nn.Module):
    """`Head.score` of pooled features, fused."""

    def __init__(self, head: nn.Module, knn: nn.Module, scales: dict[str, Robust]) -> None:
        super().__init__()
        self.head, self.knn, self.scales = head, knn, scales

    def forward(self, pooled: Tensor) -> Tensor:
        first, second = self.scales["head"], self.scales["knn"]
        return (self.head(pooled) - first.median) / first.mad + (self.knn(pooled) - second.median) / second.mad
