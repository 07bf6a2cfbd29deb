"""Deep SVDD, Deep SAD and AE-SVDD, which differ in their loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kka_ray.config.models import AeSvdd, DeepSvdd, DetectorDeepSad
from kka_ray.detectors.base import Detector
from kka_ray.detectors.svdd.loss import beyond, short_of, squared_radius
from kka_ray.detectors.training import Training, train
from kka_ray.encoders.hypersphere import Hypersphere, batches, inverse
from kka_ray.errors import DataError
from kka_ray.features.base import Features

_DEFAULTS = {"features": (512, 0, 10), "pixels": (128, 20, 30)}
"""Width, epochs of pretraining and epochs, where the configuration says none."""
_PRETRAIN_RATE = 1e-3


class HypersphereDetector(Detector):
    """What the three share: encoder, pretraining, centre, and the squared distance from it as the score."""

    keeps_decoder: ClassVar[bool] = False
    """Whether the decoder is trained beside the sphere as well."""

    def __init__(self, config: DeepSvdd | DetectorDeepSad | AeSvdd, anomaly_weight: float = 0.0) -> None:
        self.needs_pixels = config.input == "pixels"
        self.needs_pooled = not self.needs_pixels
        self._settings, self._anomaly_weight = config, anomaly_weight
        width, pretraining, epochs = _DEFAULTS[config.input]
        self._pretrain_epochs = pretraining if config.pretrain_epochs is None else config.pretrain_epochs
        self._epochs = config.epochs or epochs
        self._sphere = Hypersphere(config.input, config.width or width, config.hidden, "all")
        self._unit = 1.0
        """Mean squared distance of the training normals before training: losses then do not depend on the width."""

    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Pretrains the autoencoder, places the centre and trains by the detector's loss.

        `validation` is not looked at. Raises DataError if features of the normals do not vary, ValueError if it reads
        pixels and there are none.
        """
        sphere = self._sphere
        if anomalies is not None and (len(anomalies) == 0 or self._anomaly_weight == 0):
            anomalies = None
        # Views of anomalies alone would teach the encoder what a view is.
        rows = self._rows(normals.with_views())
        if not self.needs_pixels and rows.var(axis=0, dtype=np.float64).mean() < 1e-12:
            raise DataError(
                f"the {len(rows)} normal images have no variance, so there is no scale to whiten them by: give at "
                "least two different ones, or use the detector knn"
            )
        generator = torch.Generator().manual_seed(seed)
        x = sphere.start(rows, generator)
        known: tuple[Tensor, Tensor] | None = None
        if anomalies is not None:
            labelled = anomalies.with_views()
            weights = self._anomaly_weight * torch.from_numpy(labelled.relative_weights())
            known = sphere.tensor(self._rows(labelled)), weights
        both = nn.ModuleList([sphere.encoder, sphere.decoder])
        give_back = _reconstruction(sphere.decoder)
        self._train(
            "autoencoder", both, x, None, self._pretrain_epochs, _PRETRAIN_RATE, give_back, lambda: None, generator
        )
        sphere.place(x)
        unit = float(sphere.distance(sphere.run(x)).mean())
        # Equal images may all lie at the centre, where there is no unit.
        self._unit = unit if unit > 1e-6 else 1.0
        module, rate = both if self.keeps_decoder else sphere.encoder, self._settings.learning_rate
        begin = partial(self._begin_epoch, x)
        self._train("sphere", module, x, known, self._epochs, rate, self._of_normals, begin, generator)
        both.requires_grad_(False)

    def _begin_epoch(self, normals: Tensor) -> None:
        """Called before each epoch with what the encoder reads of the normals."""

    @abstractmethod
    def _of_normals(self, x: Tensor, z: Tensor) -> Tensor:
        """Losses (B,) of normals x (B, ...) with embeddings z (B, width)."""

    @abstractmethod
    def _of_anomalies(self, z: Tensor) -> Tensor:
        """Losses (B,) of anomalies with embeddings z (B, width)."""

    def _train(
        self,
        name: str,
        module: nn.Module,
        x: Tensor,
        known: tuple[Tensor, Tensor] | None,
        epochs: int,
        rate: float,
        loss: Callable[[Tensor, Tensor], Tensor],
        begin: Callable[[], None],
        generator: torch.Generator,
    ) -> None:
        """An epoch shows every normal of x once, and beside each batch of them as many random anomalies of `known`."""
        settings, sphere = self._settings, self._sphere
        training = _Whole(self.training) if self.needs_pixels else self.training
        optimizer = torch.optim.Adam(module.parameters(), lr=rate, weight_decay=settings.weight_decay)

        def epoch(step: Callable[[], None]) -> None:
            begin()
            sphere.encoder.train()
            for rows in batches(len(x), settings.batch, generator):
                count, own = len(rows), training.rows(len(rows))
                normal = x[rows[own]]
                if known is None:
                    total = loss(normal, sphere.encoder(normal)).sum()
                else:
                    picked = torch.randint(len(known[0]), (count,), generator=generator)[own]
                    z = sphere.encoder(torch.cat([normal, known[0][picked]]))
                    total = loss(normal, z[: len(normal)]).sum()
                    total = total + (known[1][picked] * self._of_anomalies(z[len(normal) :])).sum()
                (total / count).backward()
                step()

        steps = len(batches(len(x), settings.batch, torch.Generator()))
        train(name, module, optimizer, epochs, steps, epoch, [generator], training)

    def score(self, features: Features) -> np.ndarray:
        """||phi(x) - c||^2."""
        return self._sphere.distance(self._sphere.run(self._sphere.tensor(self._rows(features)))).numpy()

    def network(self) -> nn.Module:
        return super().network() if self.needs_pixels else _Distance(self._sphere)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._sphere.state(), {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        self._sphere.restore(tensors)
        return self

    def _rows(self, features: Features) -> np.ndarray:
        if not self.needs_pixels:
            return features.pooled
        return features.need_pixels(f"the detector {self._settings.kind}")

    def _distance(self, z: Tensor) -> Tensor:
        """Squared distances in units of those before training."""
        return self._sphere.distance(z) / self._unit


class DeepSvddDetector(HypersphereDetector):
    """Pulls normals to the centre; anomalies are ignored."""

    ignores_anomalies: ClassVar[bool] = True

    def __init__(self, config: DeepSvdd) -> None:
        super().__init__(config)

    def _of_normals(self, x: Tensor, z: Tensor) -> Tensor:
        return self._distance(z)

    def _of_anomalies(self, z: Tensor) -> Tensor:
        raise AssertionError("anomalies are ignored")


class DeepSadDetector(HypersphereDetector):
    """Pulls normals to the centre and pushes anomalies away by the inverse of their squared distance."""

    def __init__(self, config: DetectorDeepSad) -> None:
        super().__init__(config, config.anomaly_weight)

    def _of_normals(self, x: Tensor, z: Tensor) -> Tensor:
        return self._distance(z)

    def _of_anomalies(self, z: Tensor) -> Tensor:
        return inverse(self._distance(z))


class AeSvddDetector(HypersphereDetector):
    """An autoencoder whose code is held in a sphere with a soft boundary; anomalies are held outside it."""

    keeps_decoder: ClassVar[bool] = True

    def __init__(self, config: AeSvdd) -> None:
        super().__init__(config, config.anomaly_weight)
        self.config = config
        self._radius = 0.0

    def _begin_epoch(self, normals: Tensor) -> None:
        self._radius = squared_radius(self._distance(self._sphere.run(normals)), self.config.nu)

    def _of_normals(self, x: Tensor, z: Tensor) -> Tensor:
        error = _reconstruction(self._sphere.decoder)(x, z)
        return beyond(self._distance(z), self._radius, self.config.nu) + self.config.reconstruction * error

    def _of_anomalies(self, z: Tensor) -> Tensor:
        return short_of(self._distance(z), self._radius, self.config.margin)


def _reconstruction(decoder: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean squared errors (B,) of what the decoder makes of embeddings z of x."""
    return lambda x, z: F.mse_loss(decoder(z), x, reduction="none").flatten(1).mean(1)


class _Whole(Training):
    """Every worker computes the whole of each step: batch normalisation needs all rows of a batch together."""

    def __init__(self, training: Training) -> None:
        self.read, self.keep = training.read, training.keep  # type: ignore[method-assign]


class _Distance(nn.Module):
    """`HypersphereDetector.score` of pooled features."""

    mean: Tensor
    projection: Tensor
    centre: Tensor

    def __init__(self, sphere: Hypersphere) -> None:
        super().__init__()
        assert sphere.whitening is not None
        self.encoder = sphere.encoder
        self.register_buffer("mean", torch.from_numpy(sphere.whitening.mean).float())
        self.register_buffer("projection", torch.from_numpy(sphere.whitening.projection).float())
        self.register_buffer("centre", sphere.centre)

    def forward(self, pooled: Tensor) -> Tensor:
        z = self.encoder((pooled - self.mean) @ self.projection)
        return (z - self.centre).square().sum(1)
