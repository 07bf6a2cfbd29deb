"""Features in the store: computed once for a set of images and a backbone."""

from __future__ import annotations

from kka_ray.features.base import Features
from kka_ray.store import Attempt, Output


def write_features(attempt: Attempt, features: Features) -> None:
    """Writes features as plain NumPy files."""
    attempt.array(features.pooled, "pooled")
    for name, array in (("patches", features.patches), ("pixels", features.pixels)):
        if array is not None:
            attempt.array(array, name)


def read_features(output: Output, *, patches: bool) -> Features:
    """The features in an output."""
    return Features(output.array("pooled"), output.array("patches") if patches else None, pixels=output.array("pixels"))
