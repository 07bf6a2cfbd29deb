"""An encoder that gathers normals about a centre: Deep SVDD and its relatives.

Ruff et al., "Deep One-Class Classification" (ICML 2018) and "Deep Semi-Supervised Anomaly Detection" (ICLR 2020). What
they share is here: the encoder phi without bias terms, its pretraining as an autoencoder, the centre c and the squared
distance ||phi(x) - c||^2. Which loss pulls and pushes is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kka_ray.encoders import networks
from kka_ray.encoders.whitening import Whitening

_PRETRAIN_RATE = 1e-3
_SCORING_BATCH = 1024


class Hypersphere:
    """phi and c. Reads pooled features, float (N, D), whitened first, or pixels, uint8 (N, 32, 32, 3).

    `start`, `pretrain` and `place` come first, in that order; then `train`. Deterministic given the generators and the
    thread count.
    """

    centre: Tensor
    """c, float32 (width,)."""

    def __init__(self, input: Literal["features", "pixels"], width: int, hidden: int, components: int | None) -> None:
        """`width` of the embedding; for features `hidden` units, and `components` of the whitening."""
        self.input, self.width, self.hidden, self.components = input, width, hidden, components
        self.encoder: nn.Module = nn.Identity()
        self.decoder: nn.Module | None = None
        self.whitening: Whitening | None = None

    def start(self, normals: np.ndarray, generator: torch.Generator) -> Tensor:
        """Whitens by the normals, makes encoder and decoder with random weights; gives the normals as a tensor."""
        if self.input == "features":
            self.whitening = Whitening.of(normals, self.components)
        x = self.tensor(normals)
        self._build(x.shape[1], generator)
        if self.input == "pixels":
            self.decoder = networks.PixelDecoder(self.width, generator)
        else:
            self.decoder = networks.mlp(self.width, self.hidden, x.shape[1], generator)
        return x

    def pretrain(self, x: Tensor, epochs: int, batch: int, generator: torch.Generator) -> list[float]:
        """Trains encoder and decoder to give the normals x back; the mean squared error of each epoch."""
        assert self.decoder is not None, "start comes first"
        decoder, losses = self.decoder, []
        optimiser = torch.optim.Adam([*self.encoder.parameters(), *decoder.parameters()], lr=_PRETRAIN_RATE)
        self.encoder.train()
        for _ in range(epochs):
            total = 0.0
            for rows in batches(len(x), batch, generator):
                loss = F.mse_loss(decoder(self.encoder(x[rows])), x[rows])
                total += _step(optimiser, loss) * len(rows)
            losses.append(total / len(x))
        self.encoder.eval()
        return losses

    def place(self, x: Tensor) -> None:
        """Sets c to the mean embedding of the normals x, its coordinates kept away from zero."""
        self.centre = _away_from_zero(self.run(x).mean(0))

    def train(
        self,
        x: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        epochs: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        generator: torch.Generator,
        decoder: bool = False,
    ) -> list[float]:
        """Trains the encoder by `loss(embeddings, rows)` of batches of x; the mean loss of each epoch.

        The rate falls to a tenth, linearly. `decoder`: the decoder is part of the loss and trained as well.
        """
        parameters = [*self.encoder.parameters()]
        if decoder:
            assert self.decoder is not None, "start comes first"
            parameters += self.decoder.parameters()
        optimiser = torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, epochs)
        losses = []
        self.encoder.train()
        for _ in range(epochs):
            total = 0.0
            for rows in batches(len(x), batch, generator):
                total += _step(optimiser, loss(self.encoder(x[rows]), rows)) * len(rows)
            schedule.step()
            losses.append(total / len(x))
        self.encoder.eval()
        return losses

    def distance(self, embeddings: Tensor) -> Tensor:
        """||z - c||^2 of embeddings (N, width)."""
        return (embeddings - self.centre).square().sum(1)

    @torch.inference_mode()
    def run(self, x: Tensor) -> Tensor:
        """phi(x), float32 (N, width), of what `tensor` makes."""
        parts = [self.encoder(part) for part in x.split(_SCORING_BATCH)]
        return torch.cat(parts) if len(x) else torch.zeros(0, self.width)

    def tensor(self, rows: np.ndarray) -> Tensor:
        """What the encoder reads: whitened features (N, K), or images (N, 3, 32, 32) in 0..1."""
        if self.whitening is None:
            return torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 255
        return torch.from_numpy(self.whitening(rows))

    def state(self) -> dict[str, Tensor]:
        """What `restore` reads; the decoder, which scoring does not need, is left out."""
        tensors = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        if self.whitening is not None:
            tensors["whitening.mean"] = torch.from_numpy(self.whitening.mean)
            tensors["whitening.projection"] = torch.from_numpy(self.whitening.projection)
        return tensors | {"centre": self.centre}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        inputs = 3
        if self.input == "features":
            mean, projection = tensors["whitening.mean"].numpy(), tensors["whitening.projection"].numpy()
            self.whitening, inputs = Whitening(mean, projection), projection.shape[1]
        self._build(inputs, torch.Generator())
        own = {k.removeprefix("encoder."): v for k, v in tensors.items() if k.startswith("encoder.")}
        self.encoder.load_state_dict(own)
        self.encoder.eval()
        self.centre = tensors["centre"]

    def _build(self, inputs: int, generator: torch.Generator) -> None:
        if self.input == "pixels":
            self.encoder = networks.PixelEncoder(self.width, generator)
        else:
            self.encoder = networks.mlp(inputs, self.hidden, self.width, generator)


def semi_supervised(distances: Tensor, anomalous: Tensor, weights: Tensor) -> Tensor:
    """Deep SAD's loss of squared distances d: the mean of d for normals and of weight / d for anomalies; all (N,)."""
    return torch.where(anomalous, weights * (distances + 1e-6).reciprocal(), distances).mean()


def batches(count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Row numbers in random order, in batches; a last batch of one row joins the one before (batch norm needs two)."""
    parts = list(torch.randperm(count, generator=generator).split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        last = parts.pop()
        parts[-1] = torch.cat([parts[-1], last])
    return parts


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> float:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def _away_from_zero(centre: Tensor, least: float = 0.1) -> Tensor:
    """Deep SVDD's rule: a coordinate near zero could be met by zero weights, so it is moved to +/- `least`."""
    sign = torch.where(centre < 0, -1.0, 1.0)
    return torch.where(centre.abs() < least, sign * least, centre)
