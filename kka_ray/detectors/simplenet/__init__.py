"""SimpleNet on features of a frozen backbone, or from pixels."""

from kka_ray.detectors.simplenet.model import SimpleNetDetector
from kka_ray.detectors.simplenet.pixels import PixelSimpleNetDetector

__all__ = ["PixelSimpleNetDetector", "SimpleNetDetector"]
