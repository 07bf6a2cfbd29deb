"""Anomalies made without a language model, for the ablation: what does meaning add?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from kka_ray.detectors.genias.source import perturbed
from kka_ray.detectors.perlin import blended
from kka_ray.errors import ConfigError, DataError

_NOISE = 40.0  # standard deviation, in grey levels of 255
_PARTS = 4  # patches a side, and the factor of the blur: 8 px of an image of 32
_SWAPPED = 4  # of these 16 patches


def make(kind: str, normals: Sequence[np.ndarray], count: int, seed: int) -> list[np.ndarray]:
    """`count` images made of `normals`, each uint8 and of the size of the normal that it was made of.

    `noise`: Gaussian noise of standard deviation 40. `cutpaste`: a rectangle of another normal pasted in (2 to 15 % of
    the area, after Li et al., CVPR 2021, who take it from the same image). `blur`: shrunk to a quarter and back.
    `patch_shuffle`: the 4 x 4 patches of an image in random order. `patch_swap`: 4 of these 16 taken from the same
    places of another normal. `mixup`: two normals, blended with shares of 0.3 to 0.7 (after Zhang et al., ICLR 2018).
    `perlin`: the texture of another normal, its colours changed, blended in where Perlin noise is high (after DRAEM,
    which takes textures from a data set of its own). `genias`: changed by perturbed latents of a VAE that is trained on
    the normals first, which takes a while.

    Another normal is brought to the size of the first. Normals are drawn without repeats as long as there are enough.
    Raises ConfigError for another kind, DataError without normals.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no anomaly source {kind!r}; there are: {', '.join(KINDS)}")
    if len(normals) == 0:
        raise DataError(f"the anomaly source {kind!r} needs normal images and was given none")
    rng = np.random.default_rng(seed)
    rounds = -(-count // len(normals))
    picked = [int(i) for _ in range(rounds) for i in rng.permutation(len(normals))][:count]
    if kind == "genias":
        return perturbed(normals, picked, seed) if picked else []
    return [SOURCES[kind](i, normals, rng) for i in picked]


def _noise(index: int, normals: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    image = normals[index]
    return np.clip(np.rint(image + rng.normal(0, _NOISE, image.shape)), 0, 255).astype(np.uint8)


def _cutpaste(index: int, normals: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    image = normals[index].copy()
    # With a single normal its own rectangle moves, as in the original.
    other = normals[_another(index, normals, rng)]
    area, aspect = rng.uniform(0.02, 0.15), np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
    limits = [min(a, b) for a, b in zip(image.shape[:2], other.shape[:2], strict=True)]
    side = np.sqrt(area * image.shape[0] * image.shape[1])
    height = int(np.clip(round(side / np.sqrt(aspect)), 1, limits[0]))
    width = int(np.clip(round(side * np.sqrt(aspect)), 1, limits[1]))
    top, left = (int(rng.integers(0, n - m + 1)) for n, m in zip(other.shape[:2], (height, width), strict=True))
    to_top, to_left = (int(rng.integers(0, n - m + 1)) for n, m in zip(image.shape[:2], (height, width), strict=True))
    image[to_top : to_top + height, to_left : to_left + width] = other[top : top + height, left : left + width]
    return image


def _blur(index: int, normals: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    image = normals[index]
    height, width = image.shape[:2]
    small = (max(width // _PARTS, 1), max(height // _PARTS, 1))
    picture = Image.fromarray(image).resize(small, Image.Resampling.BICUBIC)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def _patch_shuffle(index: int, normals: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    image, source = normals[index].copy(), normals[index]
    height, width, corners = _grid(index, normals)
    # A remainder at the right and the bottom, where the size is no multiple of 4, stays as it is.
    for (top, left), j in zip(corners, rng.permutation(len(corners)), strict=True):
        from_top, from_left = corners[j]
        image[top : top + height, left : left + width] = source[
            from_top : from_top + height, from_left : from_left + width
        ]
    return image


def _patch_swap(index: int, normals: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    image, other = normals[index].copy(), _another_like(index, normals, rng)
    height, width, corners = _grid(index, normals)
    for i in rng.permutation(len(corners))[:_SWAPPED]:
        top, left = corners[i]
        image[top : top + height, left : left + width] = other[top : top + height, left : left + width]
    return image


def _mixup(index: int, normals: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    share, other = rng.uniform(0.3, 0.7), _another_like(index, normals, rng)
    return np.rint(share * normals[index] + (1 - share) * other).astype(np.uint8)


def _perlin(index: int, normals: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    texture = _another_like(index, normals, rng)
    if rng.random() < 0.5:
        texture = 255 - texture
    if texture.ndim == 3:
        texture = texture[..., rng.permutation(texture.shape[2])]
    return blended(normals[index], texture, rng)


def _another(index: int, normals: Sequence[np.ndarray], rng: np.random.Generator) -> int:
    """The index of any other normal; the same where there is but one."""
    return (index + int(rng.integers(1, max(len(normals), 2)))) % len(normals)


def _another_like(index: int, normals: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Any other normal in the size of the one at `index`; where there is but one, that one upside down."""
    image, chosen = normals[index], _another(index, normals, rng)
    if chosen == index:
        return np.ascontiguousarray(image[::-1])
    other = normals[chosen]
    if other.shape[:2] == image.shape[:2]:
        return other
    return np.asarray(Image.fromarray(other).resize(image.shape[1::-1], Image.Resampling.BILINEAR))


def _grid(index: int, normals: Sequence[np.ndarray]) -> tuple[int, int, list[tuple[int, int]]]:
    """Height, width and upper left corners (row, column) of the 4 x 4 patches of a normal."""
    shape = normals[index].shape
    height, width = shape[0] // _PARTS, shape[1] // _PARTS
    if height == 0 or width == 0:
        raise DataError(f"normal image {index} of shape {shape} is too small to be cut into {_PARTS} x {_PARTS}")
    return height, width, [(row * height, column * width) for row in range(_PARTS) for column in range(_PARTS)]


SOURCES: dict[str, Callable[[int, Sequence[np.ndarray], np.random.Generator], np.ndarray]] = {
    "noise": _noise,
    "cutpaste": _cutpaste,
    "blur": _blur,
    "patch_shuffle": _patch_shuffle,
    "patch_swap": _patch_swap,
    "mixup": _mixup,
    "perlin": _perlin,
}
"""From a kind to its function of a normal's index, all normals and a generator."""

KINDS = (*SOURCES, "genias")
"""All kinds; a source in `SOURCES` needs no training."""
