"""Heads of normals against anomalies: linear, a small network, and energy; each alone or fused with k-NN."""

from kka_ray.detectors.head.energy import EnergyHeadDetector
from kka_ray.detectors.head.linear import LinearHeadDetector
from kka_ray.detectors.head.mlp import MlpHeadDetector

__all__ = ["EnergyHeadDetector", "LinearHeadDetector", "MlpHeadDetector"]
