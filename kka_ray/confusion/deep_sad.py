"""Deep SAD (Ruff et al., "Deep Semi-Supervised Anomaly Detection", 2020) as the confusion evaluator.

An encoder phi and a fixed centre c; the score of an image is ||phi(x) - c||^2. Training pulls normals to c and pushes
labelled anomalies away by the inverse of their squared distance. Every drawn image is a labelled anomaly: none enters
unlabelled, where it would count as normal.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kka_ray.config.models import DeepSad
from kka_ray.confusion import networks
from kka_ray.confusion.base import Evaluator
from kka_ray.errors import StageError
from kka_ray.features.pixels import SIDE

_PRETRAIN_RATE = 1e-3
_SHRINKAGE = 0.1
_SCORING_BATCH = 1024


class DeepSadEvaluator(Evaluator):
    """Deep SAD on pooled features or on pixels.

    Features are projected on the principal components of the training normals and whitened, their variances shrunk
    towards the mean variance: what is rare among normals then weighs as much as what varies widely among them.
    """

    losses: list[float]
    """Mean loss of each epoch of training; `pretrain_losses` those of the autoencoder."""

    def __init__(self, config: DeepSad) -> None:
        self.config = config
        self._width = config.width or (128 if config.input == "pixels" else 16)
        self.losses = []
        self.pretrain_losses: list[float] = []

    def pretrain(self, normals: np.ndarray, seed: int) -> None:
        """Fits the whitening, trains the autoencoder and sets the centre. Raises StageError as the contract says."""
        self._check(normals)
        if len(normals) < 2:
            raise StageError(f"Deep SAD needs at least 2 training normals, got {len(normals)}")
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        if self.config.input == "features":
            self._whitening = Whitening(normals, self.config.components)
        self._normals = self._tensor(normals)
        width, hidden = self._width, self.config.hidden
        decoder: nn.Module
        if self.config.input == "pixels":
            self._encoder: nn.Module = networks.PixelEncoder(width, generator)
            decoder = networks.PixelDecoder(width, generator)
        else:
            inputs = self._normals.shape[1]
            self._encoder = networks.mlp(inputs, hidden, width, generator)
            decoder = networks.mlp(width, hidden, inputs, generator)
        self._pretrain(decoder, generator)
        self._encoder.eval()
        centre = self._run(self._normals).mean(0)
        self._centre = _away_from_zero(centre)
        self.centre = self._centre.numpy().copy()

    def _pretrain(self, decoder: nn.Module, generator: torch.Generator) -> None:
        parameters = [*self._encoder.parameters(), *decoder.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=_PRETRAIN_RATE)
        self._encoder.train()
        for _ in range(self.config.pretrain_epochs):
            total = 0.0
            for rows in _batches(len(self._normals), self.config.batch, generator):
                x = self._normals[rows]
                loss = F.mse_loss(decoder(self._encoder(x)), x)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item() * len(rows)
            self.pretrain_losses.append(total / len(self._normals))

    def train(self, anomalies: np.ndarray) -> None:
        """Trains the encoder; without anomalies this is Deep SVDD. Raises StageError for rows of a wrong shape."""
        x, labelled = self._normals, torch.zeros(len(self._normals), dtype=torch.bool)
        if len(anomalies):
            self._check(anomalies)
            x = torch.cat([x, self._tensor(anomalies)])
            labelled = torch.cat([labelled, torch.ones(len(anomalies), dtype=torch.bool)])
        config = self.config
        optimiser = torch.optim.Adam(
            self._encoder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, config.epochs)
        generator = torch.Generator().manual_seed(self._seed + 1)
        self._encoder.train()
        for _ in range(config.epochs):
            total = 0.0
            for rows in _batches(len(x), config.batch, generator):
                distance = (self._encoder(x[rows]) - self._centre).square().sum(1)
                loss = torch.where(labelled[rows], config.eta / (distance + 1e-6), distance).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item() * len(rows)
            schedule.step()
            self.losses.append(total / len(x))
        self._encoder.eval()

    def score(self, rows: np.ndarray) -> np.ndarray:
        """||phi(x) - c||^2, float32 (N,)."""
        return np.square(self.embed(rows) - self.centre).sum(axis=1, dtype=np.float32)

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """phi(x), float32 (N, width)."""
        self._check(rows)
        return self._run(self._tensor(rows)).numpy()

    @torch.inference_mode()
    def _run(self, x: Tensor) -> Tensor:
        parts = [self._encoder(part) for part in x.split(_SCORING_BATCH)]
        return torch.cat(parts) if len(x) else torch.zeros(0, self._width)

    def _tensor(self, rows: np.ndarray) -> Tensor:
        if self.config.input == "pixels":
            return torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 255
        return torch.from_numpy(self._whitening(rows))

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


class Whitening:
    """Features to principal components of the training normals, at unit scale. (N, D) to float32 (N, K)."""

    def __init__(self, normals: np.ndarray, components: int | None) -> None:
        x = normals.astype(np.float64)
        self.mean = x.mean(axis=0)
        covariance = np.cov(x, rowvar=False, bias=True).reshape(x.shape[1], x.shape[1])
        if components is None:
            axes, variances = np.eye(x.shape[1]), np.diag(covariance)
        else:
            keep = min(components, x.shape[1], len(x) - 1)
            values, vectors = np.linalg.eigh(covariance)
            axes, variances = vectors[:, ::-1][:, :keep], values[::-1][:keep]
        scale = np.sqrt(np.maximum(variances, 0) + _SHRINKAGE * np.trace(covariance) / x.shape[1])
        # Normals that do not vary beyond rounding have no scale: they all become the same point, and that shows.
        usable = scale > 1e-6 * np.sqrt(np.square(x).sum(axis=1).mean())
        self.projection = axes * np.where(usable, 1 / np.where(usable, scale, 1), 0)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return ((rows - self.mean) @ self.projection).astype(np.float32)


def _away_from_zero(centre: Tensor, least: float = 0.1) -> Tensor:
    """Deep SVDD's rule: a coordinate near zero could be met by zero weights, so it is moved to +/- `least`."""
    sign = torch.where(centre < 0, -1.0, 1.0)
    return torch.where(centre.abs() < least, sign * least, centre)


def _batches(count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Row numbers in random order, in batches; a last batch of one row joins the one before (batch norm needs two)."""
    batches = list(torch.randperm(count, generator=generator).split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        last = batches.pop()
        batches[-1] = torch.cat([batches[-1], last])
    return batches
