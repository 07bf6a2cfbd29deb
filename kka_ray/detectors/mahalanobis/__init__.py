"""Mahalanobis detector."""

from kka_ray.detectors.mahalanobis.model import MahalanobisDetector

__all__ = ["MahalanobisDetector"]
