"""Energy-based outlier exposure."""

from __future__ import annotations

from torch import Tensor

from kka_ray.config.models import EnergyHead
from kka_ray.detectors.head.loss import energy, squared_hinge
from kka_ray.detectors.head.network import NetworkHead


class EnergyHeadDetector(NetworkHead):
    """The energy of a network's outputs, held low for normals and high for anomalies; alone or plus k-NN."""

    def __init__(self, config: EnergyHead) -> None:
        super().__init__(config, outputs=config.logits)
        self.config = config

    def _scores(self, outputs: Tensor) -> Tensor:
        return energy(outputs)

    def _losses(self, scores: Tensor, *, normal: bool) -> Tensor:
        bound = self.config.normal_energy if normal else self.config.anomalous_energy
        return squared_hinge(scores, bound, normal=normal)
