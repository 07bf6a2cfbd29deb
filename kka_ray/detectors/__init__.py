"""Image anomaly detectors under one contract: fit, score, heatmap, save, load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter

from kka_ray.config.models import Detector as DetectorConfig
from kka_ray.detectors.base import Detector
from kka_ray.detectors.beatgan import BeatGanDetector
from kka_ray.detectors.genias import GenIasDetector
from kka_ray.detectors.head import EnergyHeadDetector, LinearHeadDetector, MlpHeadDetector
from kka_ray.detectors.knn import KnnDetector
from kka_ray.detectors.mahalanobis import MahalanobisDetector
from kka_ray.detectors.padim import PadimDetector
from kka_ray.detectors.patchcore import PatchCoreDetector
from kka_ray.detectors.simplenet import PixelSimpleNetDetector, SimpleNetDetector
from kka_ray.detectors.svdd import AeSvddDetector, DeepSadDetector, DeepSvddDetector

DETECTORS: dict[str, Callable[[Any], Detector]] = {
    "simplenet": SimpleNetDetector,
    "knn": KnnDetector,
    "mahalanobis": MahalanobisDetector,
    "patchcore": PatchCoreDetector,
    "padim": PadimDetector,
    "head": LinearHeadDetector,
    "fused": LinearHeadDetector,
    "mlp_head": MlpHeadDetector,
    "energy_head": EnergyHeadDetector,
    "simplenet_pixels": PixelSimpleNetDetector,
    "beatgan": BeatGanDetector,
    "genias": GenIasDetector,
    "deep_svdd": DeepSvddDetector,
    "deep_sad": DeepSadDetector,
    "ae_svdd": AeSvddDetector,
}
"""From a configuration's `kind` to the class that it configures."""


def default(kind: str) -> DetectorConfig:
    """The configuration of a kind of detector, everything else by default."""
    return TypeAdapter(DetectorConfig).validate_python({"kind": kind})


def build(config: DetectorConfig) -> Detector:
    """The detector of a configuration, not yet fitted."""
    return DETECTORS[config.kind](config)
