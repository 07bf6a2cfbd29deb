"""An encoder that gathers normals about a centre: Deep SVDD and its relatives.

Ruff et al., "Deep One-Class Classification" (ICML 2018) and "Deep Semi-Supervised Anomaly Detection" (ICLR 2020). What
they share is here: the encoder phi without bias terms, the decoder of its pretraining, the centre c and the squared
distance ||phi(x) - c||^2. How they are trained is the caller's.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from kka_ray.encoders import networks
from kka_ray.encoders.state import part
from kka_ray.encoders.whitening import Whitening

_SCORING_BATCH = 1024


class Hypersphere:
    """phi and c. Reads pooled features, float (N, D), whitened first, or pixels, uint8 (N, 32, 32, 3).

    `start` comes first, `place` once the autoencoder is trained. Deterministic given generator and thread count.
    """

    centre: Tensor
    """c, float32 (width,)."""

    def __init__(
        self,
        input: Literal["features", "pixels"],
        width: int,
        hidden: int,
        components: int | Literal["all"] | None,
    ) -> None:
        """`width` of the embedding; for features `hidden` units, and `components` as `Whitening.of` has them."""
        self.input, self.width, self.hidden, self.components = input, width, hidden, components
        self.encoder: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()
        """Embeddings back to what `tensor` makes; it is there after `start` and not part of the state."""
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

    def place(self, x: Tensor) -> None:
        """Sets c to the mean embedding of the normals x, its coordinates kept away from zero."""
        self.centre = _away_from_zero(self.run(x).mean(0))

    def distance(self, embeddings: Tensor) -> Tensor:
        """||z - c||^2 of embeddings (N, width)."""
        return (embeddings - self.centre).square().sum(1)

    @torch.inference_mode()
    def run(self, x: Tensor) -> Tensor:
        """phi(x), float32 (N, width), of what `tensor` makes; leaves the encoder in evaluation mode."""
        self.encoder.eval()
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
        self.encoder.load_state_dict(part(tensors, "encoder"))
        self.centre = tensors["centre"]

    def _build(self, inputs: int, generator: torch.Generator) -> None:
        if self.input == "pixels":
            self.encoder = networks.PixelEncoder(self.width, generator)
        else:
            self.encoder = networks.mlp(inputs, self.hidden, self.width, generator)


def inverse(distances: Tensor) -> Tensor:
    """Deep SAD's loss (N,) of anomalies at squared distances (N,): 1 / d, bounded at the centre."""
    return (distances + 1e-6).reciprocal()


def batches(count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Row numbers in random order, in batches; a last batch of one row joins the one before (batch norm needs two)."""
    parts = list(torch.randperm(count, generator=generator).split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        last = parts.pop()
        parts[-1] = torch.cat([parts[-1], last])
    return parts


def _away_from_zero(centre: Tensor, least: float = 0.1) -> Tensor:
    """Deep SVDD's rule: a coordinate near zero could be met by zero weights, so it is moved to +/- `least`."""
    sign = torch.where(centre < 0, -1.0, 1.0)
    return torch.where(centre.abs() < least, sign * least, centre)
