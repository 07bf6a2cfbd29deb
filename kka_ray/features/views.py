"""Augmented views of images, for detectors that learn from a few anomalies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

_TURN = 0.5  # radians either way
_ZOOM = 0.15
_SHIFT = 0.1  # of the side, either way
_LIGHT = 0.15


def views(images: Sequence[np.ndarray], count: int, seed: int) -> list[np.ndarray]:
    """`count` views of each image, image after image, each uint8 (H, W, 3) and of its image's size.

    A view is mirrored or not, turned by up to 30 degrees, zoomed by up to 15 %, shifted by up to 10 % and lit up to
    15 % brighter or darker; what comes in at the borders is reflected. Deterministic given the seed.
    """
    rng = np.random.default_rng(seed)
    return [_view(image, rng) for image in images for _ in range(count)]


def _view(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    turn, zoom = rng.uniform(-_TURN, _TURN), rng.uniform(1 - _ZOOM, 1 + _ZOOM)
    across, down = rng.uniform(-_SHIFT, _SHIFT, 2)
    mirror, light = rng.choice([-1.0, 1.0]), rng.uniform(1 - _LIGHT, 1 + _LIGHT)
    cosine, sine = zoom * np.cos(turn), zoom * np.sin(turn)
    # From a place in the view to the place in the image, both in -1..1: the aspect keeps a turn a turn.
    height, width = image.shape[:2]
    aspect = height / width
    to_image = [[mirror * cosine, -mirror * sine * aspect, 2 * across], [sine / aspect, cosine, 2 * down]]
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    grid = F.affine_grid(torch.tensor([to_image], dtype=torch.float32), list(x.shape), align_corners=False)
    view = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)[0] * light
    return view.permute(1, 2, 0).clamp(0, 255).round().byte().numpy()
