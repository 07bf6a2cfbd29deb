"""GenIAS's anomalies as a source for other detectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from kka_ray.config.models import GenIas
from kka_ray.detectors.genias.generator import fit_generator
from kka_ray.detectors.pixels import image_tensor
from kka_ray.features.pixels import pixels

_STEPS = 300
"""Steps that the generator takes at least: with fewer its images do not depend on their latents yet."""


def perturbed(normals: Sequence[np.ndarray], picked: Sequence[int], seed: int) -> list[np.ndarray]:
    """The picked normals, uint8 of any sizes, each with the change that a perturbation of its latents makes.

    The generator learns from all `normals` at 32 px with GenIAS's default options, for more epochs where they are few.
    The change is brought to the size of the image, so that what does not change stays sharp.
    """
    random = torch.Generator().manual_seed(seed)
    x = image_tensor(pixels(normals))
    config = GenIas(kind="genias")
    epochs = max(config.generator_epochs, math.ceil(_STEPS / math.ceil(len(x) / config.batch)))
    generator = fit_generator(x, config.model_copy(update={"generator_epochs": epochs}), seed, random)
    changes = generator.change(x[list(picked)], random) * 127.5
    return [_changed(normals[i], change) for i, change in zip(picked, changes, strict=True)]


def _changed(image: np.ndarray, change: torch.Tensor) -> np.ndarray:
    """An image (H, W, 3) or (H, W) plus a change (3, 32, 32) in grey levels."""
    scaled = F.interpolate(change[None], image.shape[:2], mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    added = scaled.numpy() if image.ndim == 3 else scaled.mean(2).numpy()
    return np.rint(image + added).clip(0, 255).astype(np.uint8)
