"""PatchCore: distance to a coreset of normal patches."""

from kka_ray.detectors.patchcore.model import PatchCoreDetector

__all__ = ["PatchCoreDetector"]
