"""A perceptual loss: predicted and true images are compared in the maps of the built-in image backbone as well.

After Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), without its learned
weights. The mean squared error of pixels alone makes a small network draw blurs where it cannot tell what is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from kka_ray import assets
from kka_ray.features import efficientnet


@dataclass(frozen=True)
class Perceptual:
    """Squared distance of the unit vectors at each place of three maps, and of the pooled last one; all are added up.

    Args:
        network: the frozen backbone.
        weight: of the distance beside the flow's loss.
        image_size: side to which images are resized for the backbone, in pixels.
        from_time: noisier images than of this time are left out: what they show is not settled yet.
    """

    network: efficientnet.EfficientNetLite0
    weight: float
    image_size: int
    from_time: float

    @classmethod
    def load(cls, weight: float, image_size: int, from_time: float, device: torch.device) -> Self:
        """With EfficientNet-Lite0 on `device`. Raises AssetError if its weights are missing."""
        network = efficientnet.load(assets.resolve("builtin:efficientnet-lite0").path)
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(network, weight, image_size, from_time)

    def __call__(self, clean: Tensor, images: Tensor, time: Tensor) -> Tensor:
        """Weighted mean distance of predicted to true images, both (B, 3, S, S) in [-1, 1], at times (B,); a scalar.

        Images that are left out count as 0. The gradient flows into the predictions alone.
        """
        rows = (time >= self.from_time).nonzero().squeeze(1)
        if len(rows) == 0:
            return clean.sum() * 0
        with torch.no_grad():
            wanted = self._maps(images[rows])
        # In bfloat16 the way back through depthwise convolutions is slower on CPUs than in float32.
        with torch.autocast(clean.device.type, enabled=False):
            found = self._maps(clean[rows].float())
        distances = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(found, wanted, strict=True)]
        return self.weight * torch.stack(distances).sum() / len(clean)

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Maps (N, C, h, w) with a unit vector at each place; the last one, (N, C, 1, 1), is of the pooled features."""
        x = functional.interpolate((images + 1) / 2, (self.image_size, self.image_size), mode="bilinear")
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        maps = self.network(((x - mean) / std).contiguous(memory_format=torch.channels_last))
        pooled = maps[-1].float().mean((2, 3), keepdim=True)
        return [functional.normalize(m.float(), dim=1) for m in (*maps, pooled)]
