"""Logistic regression of normals against anomalies, alone or fused with k-NN."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from kka_ray.config.models import LinearHead
from kka_ray.detectors.head.base import Head


class LinearHeadDetector(Head):
    """`head`: the decision of the regression, log-odds of an anomaly with classes balanced. `fused`: that plus k-NN."""

    def __init__(self, config: LinearHead) -> None:
        super().__init__(config.kind, config.kind == "fused", config.neighbours)
        self.config = config
        self._weight = torch.empty(0)
        self._bias = 0.0

    def _fit_head(self, normals: np.ndarray, anomalies: np.ndarray, weights: np.ndarray, seed: int) -> None:
        x = np.concatenate([normals, anomalies]).astype(np.float64)
        y = np.repeat([0, 1], [len(normals), len(anomalies)])
        # Balanced: normals and anomalies weigh half of all rows each, before the weights of the configuration.
        each = self.config.anomaly_weight * len(x) / (2 * len(anomalies)) * weights
        sample = np.concatenate([np.full(len(normals), len(x) / (2 * len(normals))), each])
        # Solved by L-BFGS: nothing is random, so the seed has no effect.
        model = LogisticRegression(C=self.config.c, max_iter=2000).fit(x, y, sample_weight=sample)
        self._weight = torch.from_numpy(model.coef_[0].copy())
        self._bias = float(model.intercept_[0])

    def _head(self, pooled: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(pooled).double() @ self._weight + self._bias).numpy()

    def _module(self) -> nn.Module:
        return _Logit(self._weight, self._bias)

    def _head_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"weight": self._weight}, {"bias": self._bias}

    def _restore_head(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self._weight, self._bias = tensors["weight"], values["bias"]


class _Logit(nn.Module):
    weight: Tensor

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.bias = bias

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled @ self.weight + self.bias
