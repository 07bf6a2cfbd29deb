"""Logistic regression of normals against anomalies, alone or fused with k-NN."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from kka_ray.config.models import LinearHead
from kka_ray.detectors.base import Detector
from kka_ray.detectors.knn.model import NearestNormals, distances
from kka_ray.features.base import Features
from kka_ray.features.robust import Robust


class LinearHeadDetector(Detector):
    """`head`: the decision of the regression. `fused`: that plus k-NN, each standardised on validation normals."""

    needs_anomalies: ClassVar[bool] = True

    def __init__(self, config: LinearHead) -> None:
        self.config = config
        self._weight = torch.empty(0)
        self._bias = 0.0
        self._normals = torch.empty(0, 0)
        self._scales: dict[str, Robust] = {}

    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Fits the regression by L-BFGS. Nothing is random here, so `seed` has no effect.

        Raises ValueError without anomalies.
        """
        if anomalies is None or len(anomalies) == 0:
            raise ValueError(f"the detector {self.config.kind} learns from anomalies and was given none")
        known, labelled = normals.with_views(), anomalies.with_views()
        x = np.concatenate([known.pooled, labelled.pooled]).astype(np.float64)
        y = np.repeat([0, 1], [len(known), len(labelled)])
        # Balanced: normals and anomalies weigh half of all rows each, before the weights of the configuration.
        each = self.config.anomaly_weight * len(x) / (2 * len(labelled))
        weights = np.concatenate(
            [np.full(len(known), len(x) / (2 * len(known))), each * labelled.relative_weights().astype(np.float64)]
        )
        model = LogisticRegression(C=self.config.c, max_iter=2000).fit(x, y, sample_weight=weights)
        self._weight = torch.from_numpy(model.coef_[0].copy())
        self._bias = float(model.intercept_[0])
        if self.config.kind == "fused":
            self._normals = torch.from_numpy(normals.pooled.copy())
            self._scales = {name: Robust.of(s) for name, s in self._parts(validation).items()}

    def score(self, features: Features) -> np.ndarray:
        """`head`: log-odds of an anomaly, classes balanced. `fused`: a sum of two values in MADs of the normals."""
        parts = self._parts(features)
        if self.config.kind == "head":
            return parts["head"].astype(np.float32)
        return sum(self._scales[name](s) for name, s in parts.items()).astype(np.float32)  # type: ignore[union-attr]

    def network(self) -> nn.Module:
        return _Head(self._weight, self._bias, self._normals, self.config.neighbours, self._scales)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"weight": self._weight}
        if self.config.kind == "fused":
            tensors["normals"] = self._normals
        return tensors, {"bias": self._bias, "scales": {name: asdict(s) for name, s in self._scales.items()}}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        self._weight, self._bias = tensors["weight"], values["bias"]
        self._normals = tensors.get("normals", self._normals)
        self._scales = {name: Robust(**s) for name, s in values["scales"].items()}
        return self

    def _parts(self, features: Features) -> dict[str, np.ndarray]:
        head = torch.from_numpy(features.pooled).double() @ self._weight + self._bias
        parts = {"head": head.numpy()}
        if self.config.kind == "fused":
            parts["knn"] = distances(features.pooled, self._normals, self.config.neighbours)
        return parts


class _Head(nn.Module):
    """The regression in float32, and beside it k-NN where there are scales to sum them by."""

    weight: Tensor

    def __init__(
        self, weight: Tensor, bias: float, normals: Tensor, neighbours: int, scales: dict[str, Robust]
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.bias, self.scales = bias, scales
        self.knn = NearestNormals(normals, neighbours) if scales else None

    def forward(self, pooled: Tensor) -> Tensor:
        head = pooled @ self.weight + self.bias
        if self.knn is None:
            return head
        first, second = self.scales["head"], self.scales["knn"]
        return (head - first.median) / first.mad + (self.knn(pooled) - second.median) / second.mad
