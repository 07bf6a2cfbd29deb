"""GenIAS on images of 32 px: its VAE, and a classifier of normals against images that the VAE made anomalous."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kka_ray.config.models import GenIas
from kka_ray.detectors.base import Detector
from kka_ray.detectors.genias.generator import Generator, fit_generator, new_generator
from kka_ray.detectors.genias.loss import squared_error
from kka_ray.detectors.pixels import ConvEncoder, PixelSets, jittered, pixel_tensor, seeded
from kka_ray.detectors.training import train
from kka_ray.encoders.state import part
from kka_ray.features.base import Features
from kka_ray.features.robust import Robust

_CHUNK = 256


class GenIasDetector(Detector):
    """Scores are the classifier's logit plus the VAE's error of reconstruction, each in MADs of validation normals."""

    needs_pooled = False
    needs_pixels = True

    def __init__(self, config: GenIas) -> None:
        self.config = config
        self._classifier = self._new_classifier(0)
        self._generator = new_generator(config, 0)
        self._scales: dict[str, Robust] = {}

    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Trains the generator on normals, then the classifier. Raises ValueError if features come without pixels."""
        random = torch.Generator().manual_seed(seed)
        sets = PixelSets.of(normals, anomalies, "GenIAS")
        self._generator = fit_generator(pixel_tensor(normals, "GenIAS"), self.config, seed, random, self.training)
        self._fit_classifier(self._generator, sets, seed + 1, random)
        self._scales = {name: Robust.of(s) for name, s in self._parts(validation).items()}

    def _fit_classifier(self, generator: Generator, sets: PixelSets, seed: int, random: torch.Generator) -> None:
        config, model = self.config, self._new_classifier(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)

        def epoch(step: Callable[[], None]) -> None:
            for rows in torch.randperm(len(sets.normals), generator=random).split(config.batch):
                own = self.training.rows(len(rows))
                real = jittered(sets.normals[rows], random)
                made = (real + generator.change(real, random)).clamp(-1, 1)
                loss = (F.softplus(model(real[own])) + F.softplus(-model(made[own]))).sum() / len(rows)
                odd, weights = sets.draw(config.batch, random)
                if len(odd):
                    share = self.training.rows(len(odd))
                    against = (weights[share] * F.softplus(-model(odd[share])).squeeze(1)).sum() / len(odd)
                    loss = loss + config.anomaly_weight * against
                loss.backward()
                step()

        steps = -(-len(sets.normals) // config.batch)
        train("classifier", model, optimizer, config.epochs, steps, epoch, [random], self.training)
        self._classifier = model.eval().requires_grad_(False)

    def score(self, features: Features) -> np.ndarray:
        """The sum of both parts, each standardised."""
        parts = self._parts(features)
        total = self._scales["logit"](parts["logit"]) + self._scales["error"](parts["error"])
        return total.astype(np.float32)

    @torch.no_grad()
    def heatmap(self, features: Features) -> np.ndarray:
        """Squared error of each pixel's reconstruction, averaged over colours, float32 (N, 32, 32)."""
        x = pixel_tensor(features, "GenIAS").split(_CHUNK)
        return torch.cat([(rows - self._generator.reconstruct(rows)).square().mean(1) for rows in x]).numpy()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"classifier.{name}": value for name, value in self._classifier.state_dict().items()}
        tensors |= {f"generator.{name}": value for name, value in self._generator.state_dict().items()}
        return tensors, {"scales": {name: asdict(scale) for name, scale in self._scales.items()}}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        for name, module in (("classifier", self._classifier), ("generator", self._generator)):
            module.load_state_dict(part(tensors, name))
            module.eval().requires_grad_(False)
        self._scales = {name: Robust(**scale) for name, scale in values["scales"].items()}
        return self

    @torch.no_grad()
    def _parts(self, features: Features) -> dict[str, np.ndarray]:
        x = pixel_tensor(features, "GenIAS").split(_CHUNK)
        return {
            "logit": torch.cat([self._classifier(rows).squeeze(1) for rows in x]).numpy(),
            "error": torch.cat([squared_error(rows, self._generator.reconstruct(rows)) for rows in x]).numpy(),
        }

    def _new_classifier(self, seed: int) -> ConvEncoder:
        return seeded(lambda: ConvEncoder(self.config.maps, 1), seed)
