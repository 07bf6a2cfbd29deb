"""What detectors that learn from pixels share: their input, its jitter, and small convolutional networks for 32 px.

Group normalisation everywhere: what a network makes of an image then depends on that image alone, in training too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kka_ray.features.base import Features
from kka_ray.features.pixels import SIDE

_SHIFT = 4  # pixels
_GROUPS = 4
_Module = TypeVar("_Module", bound=nn.Module)


def pixel_tensor(features: Features, detector: str) -> Tensor:
    """The images as float32 (N, 3, 32, 32) in -1..1. Raises ValueError, naming the detector, if there are none."""
    return image_tensor(features.need_pixels(detector))


def image_tensor(pixels: np.ndarray) -> Tensor:
    """Images uint8 (N, 32, 32, 3) as float32 (N, 3, 32, 32) in -1..1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class PixelSets:
    """What is learned from: normals (N, 3, 32, 32) and anomalies (M, 3, 32, 32), M >= 0, with their weights (M,)."""

    normals: Tensor
    anomalies: Tensor
    weights: Tensor

    @classmethod
    def of(cls, normals: Features, anomalies: Features | None, detector: str) -> Self:
        """With the views of both: those of anomalies alone would teach what a view is."""
        x = pixel_tensor(normals.with_views(), detector)
        if anomalies is None or len(anomalies) == 0:
            return cls(x, x[:0], torch.zeros(0))
        labelled = anomalies.with_views()
        return cls(x, pixel_tensor(labelled, detector), torch.from_numpy(labelled.relative_weights()))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """At most `count` anomalies at random, jittered, and their weights; none where there are none."""
        drawn = torch.randint(max(len(self.anomalies), 1), (min(count, len(self.anomalies)),), generator=generator)
        return jittered(self.anomalies[drawn], generator), self.weights[drawn]


def jittered(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 3, H, W), each mirrored or not and shifted by up to 4 px, what comes in at the borders reflected."""
    count, _, height, width = x.shape
    padded = F.pad(x, [_SHIFT] * 4, mode="reflect")
    down, across = torch.randint(2 * _SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), across + torch.arange(width)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def seeded(make: Callable[[], _Module], seed: int) -> _Module:
    """A new module with weights from `seed` alone; the global random state is neither read nor changed."""
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_uniform_(part.weight, a=5**0.5, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif callable(reset := getattr(part, "reset_parameters", None)):
            reset()
    return module


class ConvEncoder(nn.Module):
    """Images (N, 3, 32, 32) to codes (N, width): three 4x4 convolutions of stride 2, with m, 2 m and 4 m maps."""

    def __init__(self, maps: int, width: int) -> None:
        super().__init__()
        sizes = (3, maps, 2 * maps, 4 * maps)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.GroupNorm(_GROUPS, b), nn.LeakyReLU(0.2))
            for a, b in pairwise(sizes)
        )
        self.out = nn.Linear(sizes[3] * (SIDE // 8) ** 2, width)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The maps of the three stages: (N, m, 16, 16), (N, 2 m, 8, 8), (N, 4 m, 4, 4)."""
        out = []
        for stage in self.stages:
            x = stage(x)
            out.append(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Codes (N, width)."""
        return self.out(self.maps(x)[-1].flatten(1))


class ConvDecoder(nn.Module):
    """Codes (N, width) to images (N, 3, 32, 32) in -1..1: the mirror image of `ConvEncoder`."""

    def __init__(self, maps: int, width: int) -> None:
        super().__init__()
        sizes = (4 * maps, 2 * maps, maps)
        self.start = nn.Linear(width, sizes[0] * (SIDE // 8) ** 2)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.GroupNorm(_GROUPS, b), nn.ReLU())
            for a, b in pairwise(sizes)
        )
        self.out = nn.ConvTranspose2d(maps, 3, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Images (N, 3, 32, 32)."""
        x = F.relu(self.start(z)).unflatten(1, (-1, SIDE // 8, SIDE // 8))
        for stage in self.stages:
            x = stage(x)
        return torch.tanh(self.out(x))
