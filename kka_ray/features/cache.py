"""Features in the store: computed once for a set of images and a backbone."""

from __future__ import annotations

import io

import numpy as np

from kka_ray.features.base import Features
from kka_ray.store import Attempt, Output


def write_features(attempt: Attempt, features: Features) -> None:
    """Writes features as plain NumPy files."""
    attempt.write("pooled.npy", _to_bytes(features.pooled))
    for name, array in (("patches", features.patches), ("pixels", features.pixels)):
        if array is not None:
            attempt.write(f"{name}.npy", _to_bytes(array))


def read_features(output: Output, *, patches: bool) -> Features | None:
    """The features in an output, or None if it holds none (nothing was drawn)."""
    if "pooled.npy" not in output.files:
        return None
    return Features(
        _from_bytes(output.read("pooled.npy")),
        _from_bytes(output.read("patches.npy")) if patches else None,
        pixels=_from_bytes(output.read("pixels.npy")),
    )


def _to_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _from_bytes(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)
