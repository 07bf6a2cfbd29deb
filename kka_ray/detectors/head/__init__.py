"""Linear head on frozen features, alone or fused with k-NN."""

from kka_ray.detectors.head.model import LinearHeadDetector

__all__ = ["LinearHeadDetector"]
