"""GenIAS: anomalies from perturbed latents, and a classifier against them."""

from kka_ray.detectors.genias.model import GenIasDetector

__all__ = ["GenIasDetector"]
