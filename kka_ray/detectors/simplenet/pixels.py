"""SimpleNet at 32 px without a pretrained backbone: its features are those of an autoencoder of the normals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kka_ray.config.models import PixelSimpleNet
from kka_ray.detectors.base import Detector
from kka_ray.detectors.pixels import ConvDecoder, ConvEncoder, jittered, pixel_tensor, seeded
from kka_ray.detectors.simplenet.model import SimpleNetDetector
from kka_ray.detectors.training import train
from kka_ray.encoders.state import part
from kka_ray.features.base import Features

_CHUNK = 256


class PixelSimpleNetDetector(Detector):
    """`SimpleNetDetector` on the maps of a small encoder, which is trained first and then frozen as a backbone is."""

    needs_pooled = False
    needs_pixels = True

    def __init__(self, config: PixelSimpleNet) -> None:
        self.config = config
        self._head = SimpleNetDetector(config)
        self._encoder = self._new_encoder(0)

    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Trains the autoencoder on the normals, then SimpleNet on its maps. Raises ValueError without pixels."""
        self._encoder = self._trained(pixel_tensor(normals, "SimpleNet"), seed)
        self._head.training = self.training
        mapped = None if anomalies is None or len(anomalies) == 0 else self._map(anomalies)
        self._head.fit(self._map(normals), mapped, self._map(validation), seed)

    def score(self, features: Features) -> np.ndarray:
        """See `SimpleNetDetector.score`."""
        return self._head.score(self._map(features))

    def heatmap(self, features: Features) -> np.ndarray:
        """See `SimpleNetDetector.heatmap`; float32 (N, 8, 8)."""
        return self._head.heatmap(self._map(features))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = self._head.state()
        return tensors | {f"encoder.{k}": v for k, v in self._encoder.state_dict().items()}, values

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        self._encoder.load_state_dict(part(tensors, "encoder"))
        self._encoder.eval().requires_grad_(False)
        self._head.restore({k: v for k, v in tensors.items() if not k.startswith("encoder.")}, values)
        return self

    def _new_encoder(self, seed: int) -> ConvEncoder:
        return seeded(lambda: ConvEncoder(self.config.maps, self.config.code), seed)

    def _trained(self, x: Tensor, seed: int) -> ConvEncoder:
        """The encoder of an autoencoder that was trained on images x (N, 3, 32, 32)."""
        config, random = self.config, torch.Generator().manual_seed(seed)
        encoder = self._new_encoder(seed)
        both = nn.Sequential(encoder, seeded(lambda: ConvDecoder(config.maps, config.code), seed + 1))
        optimizer = torch.optim.Adam(both.parameters(), lr=config.encoder_rate, fused=True)

        def epoch(step: Callable[[], None]) -> None:
            for rows in torch.randperm(len(x), generator=random).split(config.batch):
                real = jittered(x[rows], random)[self.training.rows(len(rows))]
                (((both(real) - real).square().mean((1, 2, 3))).sum() / len(rows)).backward()
                step()

        steps = -(-len(x) // config.batch)
        train("autoencoder", both, optimizer, config.encoder_epochs, steps, epoch, [random], self.training)
        return encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def _map(self, features: Features) -> Features:
        """The encoder's maps in the place of a backbone's: the last one pooled, the first two as patches of 8 x 8."""
        pooled, grids = [], []
        for rows in pixel_tensor(features, "SimpleNet").split(_CHUNK):
            first, second, last = self._encoder.maps(rows)
            pooled.append(F.normalize(last.mean((2, 3)), dim=1))
            maps = [F.avg_pool2d(m, 3, 1, 1, count_include_pad=False) for m in (F.avg_pool2d(first, 2), second)]
            grids.append(torch.cat(maps, 1).permute(0, 2, 3, 1).half())
        views = None if features.views is None else self._map(features.views)
        return replace(features, pooled=torch.cat(pooled).numpy(), patches=torch.cat(grids).numpy(), views=views)
