"""The small network of the trained heads, and how it is trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kka_ray.config.models import EnergyHead, MlpHead
from kka_ray.detectors.head.base import Head
from kka_ray.detectors.training import train

_LEAST_SCALE = 0.05
"""Least deviation of a feature, as a share of the mean deviation: features that normals never use stay bounded."""


class HeadNetwork(nn.Module):
    """Features (N, D), standardised by the normals, by way of one hidden layer to (N, K).

    Parameters come from `start` or `load_state_dict`; no global random state is used.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.hidden = nn.utils.skip_init(nn.Linear, inputs, hidden)
        self.out = nn.utils.skip_init(nn.Linear, hidden, outputs)

    @torch.no_grad()
    def start(self, normals: Tensor, generator: torch.Generator) -> None:
        """Statistics of normals (N, D), and random weights."""
        self.mean.copy_(normals.mean(0))
        deviation = normals.std(0, correction=0)
        self.scale.copy_(deviation.clamp_min(max(_LEAST_SCALE * float(deviation.mean()), 1e-3)))
        for layer in (self.hidden, self.out):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
            layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden((x - self.mean) / self.scale)))


class NetworkHead(Head):
    """A head that is trained by gradient steps; its score and its loss are the subclass's."""

    def __init__(self, config: MlpHead | EnergyHead, outputs: int) -> None:
        super().__init__(config.kind, config.fused, config.neighbours)
        self._settings, self._outputs = config, outputs

    @abstractmethod
    def _scores(self, outputs: Tensor) -> Tensor:
        """Scores (B,) of the network's outputs (B, K)."""

    @abstractmethod
    def _losses(self, scores: Tensor, *, normal: bool) -> Tensor:
        """Losses (B,) of scores (B,), of normals or of anomalies."""

    def _fit_head(self, normals: np.ndarray, anomalies: np.ndarray, weights: np.ndarray, seed: int) -> None:
        """An epoch shows every normal once, and beside each batch of them an equal number of random anomalies."""
        config = self._settings
        x, others = torch.from_numpy(normals), torch.from_numpy(anomalies)
        each = config.anomaly_weight * torch.from_numpy(weights).float()
        generator = torch.Generator().manual_seed(seed)
        network = self._network = HeadNetwork(x.shape[1], config.hidden, self._outputs)
        network.start(x, generator)
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)

        def epoch(step: Callable[[], None]) -> None:
            for rows in torch.randperm(len(x), generator=generator).split(config.batch):
                count, own = len(rows), self.training.rows(len(rows))
                picked = torch.randint(len(others), (count,), generator=generator)[own]
                inside = self._losses(self._scores(network(x[rows[own]])), normal=True)
                outside = self._losses(self._scores(network(others[picked])), normal=False)
                ((inside.sum() + (each[picked] * outside).sum()) / count).backward()
                step()

        steps = -(-len(x) // config.batch)
        train("head", network, optimizer, config.epochs, steps, epoch, [generator], self.training)
        network.requires_grad_(False)

    @torch.inference_mode()
    def _head(self, pooled: np.ndarray) -> np.ndarray:
        return self._scores(self._network(torch.from_numpy(pooled))).numpy()

    def _module(self) -> nn.Module:
        return _Scored(self._network, self._scores)

    def _head_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return dict(self._network.state_dict()), {}

    def _restore_head(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        own = {name: value for name, value in tensors.items() if name != "normals"}
        self._network = HeadNetwork(len(own["mean"]), self._settings.hidden, self._outputs)
        self._network.load_state_dict(own)
        self._network.requires_grad_(False)


class _Scored(nn.Module):
    def __init__(self, network: HeadNetwork, scores: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self._scores = network, scores

    def forward(self, pooled: Tensor) -> Tensor:
        return self._scores(self.network(pooled))
