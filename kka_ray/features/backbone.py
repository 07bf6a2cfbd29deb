"""Frozen image backbones: images in, pooled features and patch features out.

The built-in one is EfficientNet-Lite0; any vision model that transformers' AutoModel reads can take its place.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kka_ray import assets
from kka_ray.config.models import BackboneConfig, Engine
from kka_ray.errors import AssetError, ConfigError, DataError
from kka_ray.features import efficientnet
from kka_ray.features.base import Features
from kka_ray.features.onnx import Encoder, OnnxEncoder
from kka_ray.features.pixels import pixels as to_pixels
from kka_ray.features.pixels import resize_all

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_MAPS = 3
"""Raised when other maps or tokens of a transformers network are taken."""
_CPU_BATCH = 16
"""On a CPU maps of more images than this leave the cache: EfficientNet-Lite0 at 96 px is then a third slower."""


class _Encoder(ABC):
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    network: nn.Module

    @abstractmethod
    def __call__(self, images: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        """Pooled features (N, D) and, if asked for, patch features (N, C, h, w)."""


class Backbone:
    """A frozen image encoder, made by `load`."""

    def __init__(self, config: BackboneConfig, identity: str, encoder: Encoder, device: str) -> None:
        self.config = config
        self.identity = identity
        self.device = torch.device(device)
        self._encoder = encoder
        self._mean = torch.tensor(encoder.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(encoder.std, device=self.device).view(1, 3, 1, 1)

    @classmethod
    def load(cls, config: BackboneConfig, device: str = "cpu", engine: Engine = "torch") -> Self:
        """The backbone named by `config.model` on `device`.

        The engine `onnx` computes on the CPU alone, often faster and with the same result but for rounding. Raises
        AssetError if the model is missing or unsuitable, ConfigError if `config.image_size` is less than one of its
        patches or the engine cannot run.
        """
        if engine == "onnx" and device != "cpu":
            raise ConfigError(f"the engine onnx computes on the CPU, not on {device}: use the engine torch there")
        model = assets.resolve(config.model)
        encoder: _Encoder
        identity = model.identity
        if config.model == "builtin:efficientnet-lite0":
            encoder = _EfficientNet(model.path)
        elif config.model.startswith("builtin:"):
            raise AssetError(f"{config.model} is no image backbone; the built-in one is builtin:efficientnet-lite0")
        else:
            encoder = _Transformers(config.model, model.path, config.image_size)
            identity = f"{identity}-{encoder.reading()}"
        encoder.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if engine == "torch":
            return cls(config, identity, encoder, device)
        return cls(config, identity, OnnxEncoder(encoder, config.image_size), device)

    @property
    def network(self) -> nn.Module:
        """The frozen network."""
        return self._encoder.network

    @property
    def engine(self) -> Engine:
        """What computes it."""
        return "onnx" if isinstance(self._encoder, OnnxEncoder) else "torch"

    def forward(self, x: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        """Pooled features float32 (N, D) and, if asked for, patches float16 (N, h, w, C) of images as float32
        (N, 3, S, S) in 0..255, resized to `config.image_size` S already."""
        x = (x.to(self.device) / 255).sub_(self._mean).div_(self._std)
        vector, grid = self._encoder(x.contiguous(memory_format=torch.channels_last), patches)
        if grid is not None:
            # Some networks have maps beyond the range of float16, which ends at 65,504.
            grid = grid.clamp(-6e4, 6e4).permute(0, 2, 3, 1).half()
        return F.normalize(vector.float(), dim=1), grid

    @torch.inference_mode()
    def extract(self, images: Sequence[np.ndarray], patches: bool, pixels: bool = True) -> Features:
        """Features of uint8 images (H, W, 3), (H, W, 1) or (H, W) of any sizes, RGB or grey.

        `patches` and `pixels` say which parts of `Features` are wanted beside the pooled one.

        What comes out for an image does not depend on the images beside it, but for rounding (below 1e-5). Raises
        DataError for no images, or for one that has another shape or type.
        """
        if len(images) == 0:
            raise DataError("there are no images to extract features from")
        batch = min(self.config.batch, _CPU_BATCH) if self.device.type == "cpu" else self.config.batch
        pooled, grids = [], []
        for start in range(0, len(images), batch):
            chunk = resize_all(images[start : start + batch], start, self.config.image_size)
            vector, grid = self.forward(chunk, patches)
            pooled.append(vector.cpu().numpy())
            if grid is not None:
                grids.append(grid.cpu().numpy())
        return Features(
            np.concatenate(pooled),
            np.concatenate(grids) if patches else None,
            pixels=to_pixels(images) if pixels else None,
        )


def _local_mean(grid: Tensor) -> Tensor:
    """Each cell of (N, C, h, w) averaged with its neighbours, as in PatchCore and SimpleNet."""
    return F.avg_pool2d(grid, 3, 1, 1, count_include_pad=False)


def _one_grid(maps: Sequence[Tensor]) -> Tensor:
    """Feature maps, locally averaged, brought to the grid of the first and joined on channels."""
    size = maps[0].shape[-2:]
    means = [_local_mean(m) for m in maps]
    scaled = [m if m.shape[-2:] == size else F.interpolate(m, size, mode="bilinear") for m in means]
    return torch.cat(scaled, 1)


class _EfficientNet(_Encoder):
    def __init__(self, folder: Path) -> None:
        self.network = efficientnet.load(folder)

    def __call__(self, images: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        eighth, sixteenth, last = self.network(images)
        return last.mean((2, 3)), _one_grid([eighth, sixteenth]) if patches else None


class _Transformers(_Encoder):
    """Vision transformers (pooled: mean of the patch tokens) and convolutional networks (mean of the last map)."""

    def __init__(self, reference: str, folder: Path, size: int) -> None:
        from transformers import AutoModel

        try:
            model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise AssetError(
                f"{reference} cannot be read as a transformers model with safetensors weights: {error}"
            ) from error
        model = getattr(model, "vision_model", model)  # CLIP and its like
        parameters = inspect.signature(model.forward).parameters
        if model.main_input_name != "pixel_values" or "pixel_values" not in parameters:
            raise AssetError(f"{reference} is no image backbone: its input is {model.main_input_name}")
        self.size = size
        self.patch_size = getattr(model.config, "patch_size", None)
        if isinstance(self.patch_size, int) and self.patch_size > size:
            raise ConfigError(
                f"image_size = {size} is less than one patch of {reference}, {self.patch_size} px: raise image_size"
            )
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        self.mean, self.std = _statistics(folder)
        self.network: nn.Module = model.eval().requires_grad_(False)

    def __call__(self, images: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        out = self.network(pixel_values=images, output_hidden_states=True, **self.options)
        last = out.last_hidden_state
        if last.ndim == 4:
            if not patches:
                return last.mean((2, 3)), None
            # The last map of stride 8 and of 16, where the network has them.
            # Where strides do not divide the size, some networks round the sides of their maps up and some down.
            found = [m for m in out.hidden_states or () if m.ndim == 4]
            of_stride = {2 ** round(math.log2(self.size / m.shape[-1])): m for m in found}
            maps = [of_stride[stride] for stride in (8, 16) if stride in of_stride]
            return last.mean((2, 3)), _one_grid(maps or [last])
        tokens = self._grid(last)
        return tokens.mean((2, 3)), tokens if patches else None

    def reading(self) -> str:
        """What features depend on beside the weights: how the images are scaled, and which maps are taken."""
        return hashlib.sha256(json.dumps([self.mean, self.std, _MAPS]).encode()).hexdigest()[:8]

    def _grid(self, tokens: Tensor) -> Tensor:
        """Patch tokens (N, T, C) as a map (N, C, h, w), class and register tokens at the front left out."""
        count = tokens.shape[1]
        side = self.size // self.patch_size if isinstance(self.patch_size, int) else math.isqrt(count)
        if side * side > count:
            side = math.isqrt(count)  # hierarchical networks merge patches
        patches = tokens[:, count - side * side :]
        return patches.transpose(1, 2).reshape(len(tokens), -1, side, side)


def _statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the channels that the model was trained with; those of ImageNet if it does not say."""
    values: dict[str, Any] = {}
    for file, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if (folder / file).is_file():
            found = json.loads((folder / file).read_text())
            values |= (found.get(part) or {}) if part else found
    mean, std = values.get("image_mean") or _IMAGENET_MEAN, values.get("image_std") or _IMAGENET_STD
    return tuple(mean), tuple(std)
