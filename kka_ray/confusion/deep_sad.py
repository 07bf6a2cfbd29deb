"""Deep SAD (Ruff et al., "Deep Semi-Supervised Anomaly Detection", 2020) as the confusion evaluator.

An encoder phi and a fixed centre c; the score of an image is ||phi(x) - c||^2. Training pulls normals to c and pushes
labelled anomalies away by the inverse of their squared distance. Every drawn image is a labelled anomaly: none enters
unlabelled, where it would count as normal.

Deep SAD weighs each anomaly by eta, so that more of them push further: an early round's evaluator, which has seen few
images, would call easy what a later one calls hard, and its hardness would be the noisier. With `balanced` all of them
together weigh eta times what the normals do.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kka_ray.config.models import DeepSad
from kka_ray.confusion.base import Evaluator
from kka_ray.encoders.hypersphere import Hypersphere, batches, inverse
from kka_ray.errors import StageError
from kka_ray.features.pixels import SIDE

_PRETRAIN_RATE = 1e-3


class DeepSadEvaluator(Evaluator):
    """Deep SAD on whitened pooled features or on pixels."""

    losses: list[float]
    """Mean loss of each epoch of training; `pretrain_losses` those of the autoencoder."""

    def __init__(self, config: DeepSad) -> None:
        self.config = config
        width = config.width or (128 if config.input == "pixels" else 16)
        self.sphere = Hypersphere(config.input, width, config.hidden, config.components)
        self.losses = []
        self.pretrain_losses: list[float] = []

    def pretrain(self, normals: np.ndarray, seed: int) -> None:
        """Fits the whitening, trains the autoencoder and sets the centre. Raises StageError as the contract says."""
        self._check(normals)
        if len(normals) < 2:
            raise StageError(f"Deep SAD needs at least 2 training normals, got {len(normals)}")
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._normals = self.sphere.start(normals, generator)
        self._pretrain(generator)
        self.sphere.place(self._normals)
        self.centre = self.sphere.centre.numpy().copy()

    def _pretrain(self, generator: torch.Generator) -> None:
        encoder, decoder, x = self.sphere.encoder, self.sphere.decoder, self._normals
        optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=_PRETRAIN_RATE)
        encoder.train()
        for _ in range(self.config.pretrain_epochs):
            total = 0.0
            for rows in batches(len(x), self.config.batch, generator):
                loss = F.mse_loss(decoder(encoder(x[rows])), x[rows])
                total += _step(optimiser, loss) * len(rows)
            self.pretrain_losses.append(total / len(x))

    def train(self, anomalies: np.ndarray) -> None:
        """Trains the encoder; without anomalies this is Deep SVDD. Raises StageError for rows of a wrong shape."""
        config, x = self.config, self._normals
        anomalous = torch.arange(len(x) + len(anomalies)) >= len(x)
        weight = config.eta
        if len(anomalies):
            weight *= len(x) / len(anomalies) if config.balanced else 1
            self._check(anomalies)
            x = torch.cat([x, self.sphere.tensor(anomalies)])

        encoder = self.sphere.encoder
        optimiser = torch.optim.Adam(encoder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, config.epochs)
        generator = torch.Generator().manual_seed(self._seed + 1)
        encoder.train()
        for _ in range(config.epochs):
            total = 0.0
            for rows in batches(len(x), config.batch, generator):
                distance = self.sphere.distance(encoder(x[rows]))
                loss = torch.where(anomalous[rows], weight * inverse(distance), distance).mean()
                total += _step(optimiser, loss) * len(rows)
            schedule.step()
            self.losses.append(total / len(x))

    def score(self, rows: np.ndarray) -> np.ndarray:
        """||phi(x) - c||^2, float32 (N,)."""
        return np.square(self.embed(rows) - self.centre).sum(axis=1, dtype=np.float32)

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """phi(x), float32 (N, width)."""
        self._check(rows)
        return self.sphere.run(self.sphere.tensor(rows)).numpy()

    def _check(self, rows: np.ndarray) -> None:
        if self.config.input == "pixels":
            if rows.shape[1:] != (SIDE, SIDE, 3) or rows.dtype != np.uint8:
                raise StageError(
                    f"the evaluator reads pixels: uint8 (N, {SIDE}, {SIDE}, 3), got {rows.dtype} {rows.shape}"
                )
        elif rows.ndim != 2:
            raise StageError(f"the evaluator reads pooled features (N, D), got shape {rows.shape}")
        elif not np.isfinite(rows).all():
            raise StageError("features given to the evaluator are not finite; look for damaged images")


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> float:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()
