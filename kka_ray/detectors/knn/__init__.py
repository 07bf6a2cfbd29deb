"""k-nearest-neighbour detector."""

from kka_ray.detectors.knn.model import KnnDetector

__all__ = ["KnnDetector"]
