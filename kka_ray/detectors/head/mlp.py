"""A small network that tells normals from anomalies."""

from __future__ import annotations

from torch import Tensor

from kka_ray.config.models import MlpHead
from kka_ray.detectors.head.loss import cross_entropy
from kka_ray.detectors.head.network import NetworkHead


class MlpHeadDetector(NetworkHead):
    """Log-odds of an anomaly, classes balanced; alone or plus k-NN."""

    def __init__(self, config: MlpHead) -> None:
        super().__init__(config, outputs=1)

    def _scores(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0]

    def _losses(self, scores: Tensor, *, normal: bool) -> Tensor:
        return cross_entropy(scores, normal=normal)
