"""What detectors of patch features share: their rows, their maps, and the sum of patch and image scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from kka_ray.features.base import Features
from kka_ray.features.robust import Robust


def patch_rows(features: Features, detector: str) -> Tensor:
    """Patch features as (N, h * w, C), float16, not copied.

    Raises ValueError, naming the detector, if the features come without patches.
    """
    if features.patches is None:
        raise ValueError(f"{detector} needs patch features: extract with patches=True")
    count, height, width, channels = features.patches.shape
    return torch.from_numpy(features.patches).reshape(count, height * width, channels)


def on_grid(scores: Tensor, features: Features) -> np.ndarray:
    """Scores (N, h * w) as a map, float32 (N, h, w), on the patch grid of the features."""
    assert features.patches is not None
    _, height, width, _ = features.patches.shape
    return scores.reshape(-1, height, width).float().numpy()


@dataclass(frozen=True)
class Fusion:
    """The sum of an image's patch score and its whole-image score, each in MADs of validation normals."""

    patch: Robust
    image: Robust

    @classmethod
    def of(cls, patch: np.ndarray, image: np.ndarray) -> Self:
        """From both scores (N,) of the validation normals."""
        return cls(Robust.of(patch), Robust.of(image))

    @classmethod
    def restore(cls, values: dict[str, dict[str, float]] | None) -> Self | None:
        """Of what `dataclasses.asdict` makes of one; None of None."""
        return cls(**{name: Robust(**scale) for name, scale in values.items()}) if values else None

    def __call__(self, patch: np.ndarray, image: np.ndarray, weight: float) -> np.ndarray:
        """z(patch) + weight z(image), float32 (N,)."""
        return (self.patch(patch) + weight * self.image(image)).astype(np.float32)
