"""The contract of a detector: it is fitted on features of normal images, and of anomalies where there are any."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor, nn

from kka_ray.detectors.training import ALONE, Training
from kka_ray.errors import ConfigError
from kka_ray.features.base import Features


class Detector(ABC):
    """Scores features of images; higher is more anomalous. An image-level detector is `kka_ray.detectors.tuned`.

    A detector is made from its configuration (`kka_ray.config.models`) and does nothing before `fit` or `restore`.
    """

    needs_pooled: bool = True
    """Whether `Features.pooled` is read; where not, it may have no dimensions, and scoring needs no backbone."""

    needs_patches: ClassVar[bool] = False
    """Whether `Features.patches` must be there."""

    needs_pixels: bool = False
    """Whether `Features.pixels` must be there; a detector whose configuration decides that sets it when it is made."""

    needs_anomalies: ClassVar[bool] = False
    """Whether `fit` raises ValueError without anomalies."""

    ignores_anomalies: ClassVar[bool] = False
    """Whether anomalies make no difference to `fit`."""

    training: Training = ALONE
    """How gradient steps are run; who shares them among workers sets it before `fit`. A detector that does not look at
    it computes the whole on every worker."""

    @abstractmethod
    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Fits to training normals and, if any are given, anomalies.

        Anomalies count as `anomalies.relative_weights()` says. `validation` are normals for standardising scores that
        are summed; nothing else may be learned from them.
        Deterministic given the seed and the thread count. What is fitted is that of the last epoch.
        """

    @abstractmethod
    def score(self, features: Features) -> np.ndarray:
        """Anomaly scores, float32 (N,), finite; independent of how images are batched."""

    def heatmap(self, features: Features) -> np.ndarray | None:
        """Anomaly scores by place, float32 (N, h, w), in the method's own unit; None where the method has none.

        What is shown is `kka_ray.detectors.tuned.TunedDetector.heatmap`, in one unit for all.
        """
        return None

    def network(self) -> nn.Module:
        """The score as a module, for export: pooled features (N, D) and, where it needs them, patch features
        (N, h, w, C), both float32, to scores (N,). Raises ConfigError where the method has no such form."""
        raise ConfigError(f"{type(self).__name__} cannot be exported: it does not score features by a network")

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was fitted: tensors for safetensors, and JSON values."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        """The inverse of `state`; returns itself."""
