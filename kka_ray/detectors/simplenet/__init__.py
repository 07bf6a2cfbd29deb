"""SimpleNet detector."""

from kka_ray.detectors.simplenet.model import SimpleNetDetector

__all__ = ["SimpleNetDetector"]
