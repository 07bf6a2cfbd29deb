"""GenIAS's generator on images of 32 px: a VAE that makes anomalies by perturbing the latents of normals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kka_ray.config.models import GenIas
from kka_ray.detectors.genias.loss import divergence, margins, squared_error
from kka_ray.detectors.pixels import ConvDecoder, ConvEncoder, jittered, seeded
from kka_ray.detectors.training import ALONE, Training, train

_SCALE_RATE = 10
"""Learning rate of the perturbation's scale, in units of that of the networks: it starts at 1, which is no change."""
_AREA = (0.1, 0.6)


class Generator(nn.Module):
    """Encoder, decoder and, for each latent dimension, the learned scale of its perturbation."""

    def __init__(self, maps: int, width: int) -> None:
        super().__init__()
        self.encoder, self.decoder = ConvEncoder(maps, 2 * width), ConvDecoder(maps, width)
        self.log_scale = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the scales to 1."""
        nn.init.zeros_(self.log_scale)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and log variance of the latents (N, D), reconstructions and perturbed images (N, 3, 32, 32).

        noise: (N, D), standard normal. Both are decoded from the same noise, times the latents' deviation, and times
        the scale for the perturbed ones.
        """
        mean, log_variance = self.encoder(x).chunk(2, 1)
        # Beyond these a latent is as good as exact, or tells nothing.
        log_variance = log_variance.clamp(-8, 4)
        spread = noise * (log_variance / 2).exp()
        perturbed = mean + self.log_scale.exp() * spread
        return mean, log_variance, self.decoder(mean + spread), self.decoder(perturbed)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) from the means of their latents."""
        return self.decoder(self.encoder(x).chunk(2, 1)[0])

    @torch.no_grad()
    def change(self, x: Tensor, random: torch.Generator) -> Tensor:
        """What a perturbation changes of images (N, 3, 32, 32): everywhere, or in one rectangle of every other image.

        The rectangle stands for the segment of a time series that GenIAS puts its patterns into.
        """
        noise = torch.randn(len(x), len(self.log_scale), generator=random)
        _, _, plain, perturbed = self(x, noise)
        return (perturbed - plain) * _places(len(x), x.shape[2], random)[:, None]


def new_generator(config: GenIas, seed: int) -> Generator:
    """Not yet trained."""
    return seeded(lambda: Generator(config.maps, config.width), seed)


def fit_generator(
    x: Tensor, config: GenIas, seed: int, random: torch.Generator, training: Training = ALONE
) -> Generator:
    """Trains on normals (N, 3, 32, 32) in -1..1."""
    model = new_generator(config, seed)
    networks = [*model.encoder.parameters(), *model.decoder.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": networks},
        {"params": [model.log_scale], "lr": _SCALE_RATE * config.learning_rate},
    ]
    optimizer = torch.optim.Adam(groups, lr=config.learning_rate, fused=True)

    def epoch(step: Callable[[], None]) -> None:
        for rows in torch.randperm(len(x), generator=random).split(config.batch):
            own = training.rows(len(rows))
            real = jittered(x[rows], random)[own]
            noise = torch.randn(len(rows), config.width, generator=random)[own]
            mean, log_variance, plain, perturbed = model(real, noise)
            error = squared_error(real, plain)
            # The reconstruction is held by its own error; the margins move the perturbed image alone.
            beyond = margins(error.detach(), squared_error(real, perturbed), config.least, config.most)
            loss = error + config.compactness * divergence(mean, log_variance, config.prior)
            ((loss + config.perturbation * beyond).sum() / len(rows)).backward()
            step()

    steps = -(-len(x) // config.batch)
    train("generator", model, optimizer, config.generator_epochs, steps, epoch, [random], training)
    return model.eval().requires_grad_(False)


def _places(count: int, side: int, random: torch.Generator) -> Tensor:
    """Masks (N, H, W): whole images and rectangles in turn."""
    area = _AREA[0] + (_AREA[1] - _AREA[0]) * torch.rand(count, 1, generator=random)
    extent = (side * area.sqrt()).round()
    start = torch.rand(2, count, 1, generator=random) * (side - extent + 1) - 0.5
    start[:, ::2], extent[::2] = -1, side + 2
    place = torch.arange(side)
    down, across = ((place >= s) & (place < s + extent) for s in start)
    return (down[:, :, None] & across[:, None]).float()
