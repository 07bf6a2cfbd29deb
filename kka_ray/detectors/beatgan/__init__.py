"""BEAT-GAN: adversarially regularised reconstruction."""

from kka_ray.detectors.beatgan.model import BeatGanDetector

__all__ = ["BeatGanDetector"]
