"""Images brought to one size: for backbones, and as the input of networks that learn from pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kka_ray.errors import DataError

SIDE = 32
"""Side of the images that networks without a backbone see, in pixels; that of the images of CIFAR-100."""

_TOGETHER = 16_000_000
"""Pixels that are resized at once, 240 MB, unless one image has more: 16 photographs of a camera take gigabytes."""


def pixels(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 images (H, W, 3), (H, W, 1) or (H, W) of any sizes as uint8 (N, 32, 32, 3); one of 32 px stays as it is.

    Raises DataError for an image of another shape or type.
    """
    out = np.zeros((len(images), SIDE, SIDE, 3), np.uint8)
    for i, image in enumerate(images):
        out[i] = resize(image, i, SIDE).permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
    return out


def resize_all(images: Sequence[np.ndarray], first: int, size: int) -> Tensor:
    """`resize` of each image, (N, 3, size, size), to the bit; `first` is the index of the first one.

    Small colour images of one shape, as those of most data sets are, are resized together, which is faster.
    """
    shapes = {(x.shape, x.dtype) for x in images}
    (shape, dtype), *others = shapes
    apart = others or dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape
    if apart or len(images) * shape[0] * shape[1] > _TOGETHER:
        return torch.stack([resize(image, first + i, size) for i, image in enumerate(images)])
    return _interpolate(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float(), size)


def resize(image: np.ndarray, index: int, size: int) -> Tensor:
    """An image, resized bilinearly to a square, as float32 (3, size, size) in 0..255.

    Raises DataError, naming `index`, if it is not uint8 (H, W, 3), (H, W, 1) or (H, W).
    """
    if image.dtype != np.uint8:
        raise DataError(f"image {index} has type {image.dtype}: images must be uint8, 0 to 255")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise DataError(f"image {index} has shape {image.shape}: images must be (H, W, 3) in RGB, or (H, W) in grey")
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    return _interpolate(x, size)[0].expand(3, -1, -1)


def _interpolate(x: Tensor, size: int) -> Tensor:
    if x.shape[-2:] == (size, size):
        return x
    shrinks = max(x.shape[-2:]) > size
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)
