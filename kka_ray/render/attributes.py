"""What can be measured of a small photograph and said in words: colours, brightness, background, texture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

_HUES = (
    (15, "red"),
    (40, "orange"),
    (66, "yellow"),
    (165, "green"),
    (255, "blue"),
    (290, "purple"),
    (335, "pink"),
    (360, "red"),
)
"""Upper bounds of the hues, in degrees, and their names."""

_NAMES = ("black", "grey", "white", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
_BRIGHT, _DARK = 0.72, 0.28
_SMOOTH, _BUSY = 0.025, 0.10


@dataclass(frozen=True)
class Attributes:
    """Words for an image; None where no word holds clearly enough."""

    colour: str | None
    """Of the middle of the image."""
    background: str | None
    """Colour of the image's edge."""
    plain: bool
    """The edge is of one tone."""
    light: str | None
    """`bright` or `dark`."""
    texture: str | None
    """`smooth` or `detailed`."""


def measure(image: np.ndarray) -> Attributes:
    """Attributes of an RGB image, uint8 (S, S, 3) with S of at least 8.

    The middle is the inner half of the image's sides, the edge a frame of a tenth of them. A colour is named where it
    takes 45 % of its region.
    """
    names, value = _colour_names(image), image.astype(np.float32).mean(2) / 255
    size = len(image)
    inner, frame = slice(size // 4, size - size // 4), max(1, size // 10)
    edge = np.ones((size, size), bool)
    edge[frame:-frame, frame:-frame] = False
    light = float(value.mean())
    rough = float((np.abs(np.diff(value, axis=0)).mean() + np.abs(np.diff(value, axis=1)).mean()) / 2)
    return Attributes(
        colour=_dominant(names[inner, inner].ravel()),
        background=_dominant(names[edge]),
        plain=float(image[edge].astype(np.float32).std(0).mean()) < 16,
        light="bright" if light > _BRIGHT else "dark" if light < _DARK else None,
        texture="smooth" if rough < _SMOOTH else "detailed" if rough > _BUSY else None,
    )


def _dominant(names: np.ndarray) -> str | None:
    counts = np.bincount(names, minlength=len(_NAMES))
    return _NAMES[counts.argmax()] if counts.max() >= 0.45 * len(names) else None


def _colour_names(image: np.ndarray) -> np.ndarray:
    """The number in `_NAMES` of each pixel's colour."""
    hsv = np.asarray(Image.fromarray(image).convert("HSV"), np.float32)
    hue, saturation, value = hsv[..., 0] * (360 / 255), hsv[..., 1] / 255, hsv[..., 2] / 255
    hue_names = np.array([_NAMES.index(name) for _, name in _HUES])
    named = hue_names[np.searchsorted([bound for bound, _ in _HUES], hue, side="left").clip(max=len(_HUES) - 1)]
    warm = (hue < 45) | (hue > 345)
    named = np.where(warm & (value < 0.65) & (saturation < 0.85), _NAMES.index("brown"), named)
    tones = np.select([value < 0.3, value < 0.8], [_NAMES.index("black"), _NAMES.index("grey")], _NAMES.index("white"))
    named = np.where(saturation < 0.18, tones, named)
    return np.where(value < 0.18, _NAMES.index("black"), named)
