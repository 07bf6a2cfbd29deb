"""BEAT-GAN on images of 32 px: an autoencoder whose reconstructions a discriminator cannot tell from images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from kka_ray.config.models import BeatGan
from kka_ray.detectors.base import Detector
from kka_ray.detectors.beatgan.loss import discriminator_loss, errors, relative_inverse
from kka_ray.detectors.pixels import ConvDecoder, ConvEncoder, PixelSets, jittered, pixel_tensor, seeded
from kka_ray.detectors.training import train
from kka_ray.features.base import Features

_CHUNK = 256


class BeatGanDetector(Detector):
    """Scores are mean squared errors of reconstruction, images in -1..1."""

    needs_pooled = False
    needs_pixels = True

    def __init__(self, config: BeatGan) -> None:
        self.config = config
        self._generator = self._new_generator(0)

    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Trains generator and discriminator in turns; the generator alone is kept.

        Raises ValueError if features come without pixels.
        """
        config, random = self.config, torch.Generator().manual_seed(seed)
        sets = PixelSets.of(normals, anomalies, "BEAT-GAN")
        generator = self._new_generator(seed)
        discriminator = seeded(lambda: ConvEncoder(config.maps, 1), seed + 1)
        both = nn.ModuleList([generator, discriminator])
        optimizer = torch.optim.Adam(both.parameters(), lr=config.learning_rate, betas=(0.5, 0.999), fused=True)

        def epoch(step: Callable[[], None]) -> None:
            for rows in torch.randperm(len(sets.normals), generator=random).split(config.batch):
                own = self.training.rows(len(rows))
                real = jittered(sets.normals[rows], random)[own]
                fake = generator(real)
                against = discriminator_loss(discriminator(real), discriminator(fake.detach()))
                (against / len(rows)).backward()
                step()
                loss = self._generator_loss(generator, discriminator, real, fake, len(rows), sets, random)
                loss.backward(inputs=[*generator.parameters()])
                step()

        steps = 2 * -(-len(sets.normals) // config.batch)
        train("beatgan", both, optimizer, config.epochs, steps, epoch, [random], self.training)
        self._generator = generator.eval().requires_grad_(False)

    def _generator_loss(
        self,
        generator: nn.Module,
        discriminator: ConvEncoder,
        real: Tensor,
        fake: Tensor,
        count: int,
        sets: PixelSets,
        random: torch.Generator,
    ) -> Tensor:
        """Of this worker's part of a batch of `count` images."""
        with torch.no_grad():
            wanted = discriminator.maps(real)[-1]
        error, matching = errors(real, fake), errors(discriminator.maps(fake)[-1], wanted)
        loss = (error + self.config.adversarial * matching).sum() / count
        odd, weights = sets.draw(self.config.batch, random)
        if len(odd) == 0:
            return loss
        mean = error.detach().sum()[None] / count
        self.training.add([mean])
        own = self.training.rows(len(odd))
        far = relative_inverse(float(mean), errors(odd[own], generator(odd[own])), weights[own])
        return loss + self.config.anomaly_weight * far / len(odd)

    @torch.no_grad()
    def score(self, features: Features) -> np.ndarray:
        """Mean squared error of each image's reconstruction."""
        x = pixel_tensor(features, "BEAT-GAN").split(_CHUNK)
        return torch.cat([errors(part, self._generator(part)) for part in x]).numpy()

    @torch.no_grad()
    def heatmap(self, features: Features) -> np.ndarray:
        """Squared error of each pixel, averaged over colours, float32 (N, 32, 32)."""
        x = pixel_tensor(features, "BEAT-GAN").split(_CHUNK)
        return torch.cat([(part - self._generator(part)).square().mean(1) for part in x]).numpy()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._generator.state_dict(), {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        self._generator.load_state_dict(tensors)
        self._generator.eval().requires_grad_(False)
        return self

    def _new_generator(self, seed: int) -> nn.Sequential:
        maps, width = self.config.maps, self.config.width
        return seeded(lambda: nn.Sequential(ConvEncoder(maps, width), ConvDecoder(maps, width)), seed)
