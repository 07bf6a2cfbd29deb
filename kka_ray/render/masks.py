"""Random blobs within which an image-to-image edit happens."""

from __future__ import annotations

import numpy as np


def blob_mask(height: int, width: int, seed: int, min_area: float, max_area: float) -> np.ndarray:
    """One connected blob with a wavy edge, bool (height, width), at a random place; the same one for the same seed.

    Its share of the image is drawn uniformly from [min_area, max_area], both in (0, 1], and met to the pixel (at
    least one). Raises ValueError if the range is empty or outside (0, 1].
    """
    if not 0 < min_area <= max_area <= 1:
        raise ValueError(f"mask areas must satisfy 0 < min_area <= max_area <= 1, got {min_area} and {max_area}")
    rng = np.random.default_rng([seed, 0x6D61736B])
    pixels = int(np.clip(round(rng.uniform(min_area, max_area) * height * width), 1, height * width))
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    # The centre is the middle of a pixel, so that even a blob of one pixel has it.
    dy = (y - rng.integers(height)) / height
    dx = (x - rng.integers(width)) / width
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1, 2)
    u = dx * np.cos(turn) + dy * np.sin(turn)
    v = (dy * np.cos(turn) - dx * np.sin(turn)) * stretch
    angle = np.arctan2(v, u)
    edge = np.ones_like(angle)
    for waves in range(2, 6):
        edge += rng.uniform(0, 0.5 / waves) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    # Pixels in order of their distance in units of the edge's: any first part of them is a star-shaped blob.
    nearest = np.argsort((np.hypot(u, v) / edge).ravel(), kind="stable")[:pixels]
    mask = np.zeros(height * width, bool)
    mask[nearest] = True
    return mask.reshape(height, width)
