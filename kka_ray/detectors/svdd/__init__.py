"""Deep SVDD, Deep SAD and AE-SVDD: normals gathered about a centre."""

from kka_ray.detectors.svdd.model import AeSvddDetector, DeepSadDetector, DeepSvddDetector

__all__ = ["AeSvddDetector", "DeepSadDetector", "DeepSvddDetector"]
