"""PaDiM: a Gaussian of patch features at each place."""

from kka_ray.detectors.padim.model import PadimDetector

__all__ = ["PadimDetector"]
