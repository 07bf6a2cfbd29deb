"""Perlin noise, and textures blended into images where it is high, after DRAEM (Zavrtanik et al., ICCV 2021)."""

from __future__ import annotations

import numpy as np

_CELLS = (1, 2, 4, 8)
_AREA = (0.05, 0.3)
_SHARE = (0.2, 1.0)


def perlin_noise(height: int, width: int, cells: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of about -1..1, (height, width), with random slopes at the corners of `cells` (down, across)."""
    angles = rng.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    rows, columns = np.arange(height) * cells[0] / height, np.arange(width) * cells[1] / width
    top, left = rows.astype(int)[:, None], columns.astype(int)[None]
    down, across = rows[:, None] - top, columns[None] - left

    def ramp(below: int, right: int) -> np.ndarray:
        angle = angles[top + below, left + right]
        return np.sin(angle) * (down - below) + np.cos(angle) * (across - right)

    y, x = _eased(down), _eased(across)
    upper = ramp(0, 0) * (1 - x) + ramp(0, 1) * x
    lower = ramp(1, 0) * (1 - x) + ramp(1, 1) * x
    return np.sqrt(2) * (upper * (1 - y) + lower * y)


def blended(image: np.ndarray, texture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`image`, uint8 (H, W) or (H, W, C), with `texture` of the same shape blended in over 5 to 30 % of its area.

    Where Perlin noise of a random scale is highest, the texture takes a share of 0.2 to 1. DRAEM cuts the noise at a
    fixed level instead, which leaves some images without any texture.
    """
    height, width = image.shape[:2]
    cells = (int(rng.choice(_CELLS)), int(rng.choice(_CELLS)))
    noise = perlin_noise(height, width, cells, rng)
    most = max(1, round(rng.uniform(*_AREA) * noise.size))
    mask = noise >= np.sort(noise, axis=None)[-most]
    share = rng.uniform(*_SHARE)
    out = image.copy()
    out[mask] = np.rint((1 - share) * image[mask] + share * texture[mask]).astype(np.uint8)
    return out


def _eased(x: np.ndarray) -> np.ndarray:
    return x**3 * (x * (6 * x - 15) + 10)
