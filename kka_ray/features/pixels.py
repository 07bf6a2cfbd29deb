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


def pixels(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 images (H, W, 3), (H, W, 1) or (H, W) of any sizes as uint8 (N, 32, 32, 3); one of 32 px stays as it is.

    Raises DataError for an image of another shape or type.
    """
    out = np.zeros((len(images), SIDE, SIDE, 3), np.uint8)
    for i, image in enumerate(images):
        out[i] = resize(image, i, SIDE).permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
    return out


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
    if x.shape[-2:] != (size, size):
        shrinks = max(x.shape[-2:]) > size
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)
    return x[0].expand(3, -1, -1)
