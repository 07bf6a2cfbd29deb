"""SimpleNet (Liu et al., CVPR 2023) on patch features and on the image feature, with anomalies as further negatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from kka_ray.config.models import PixelSimpleNet, SimpleNet
from kka_ray.detectors.base import Detector
from kka_ray.detectors.patches import on_grid, patch_rows
from kka_ray.detectors.simplenet.branch import Branch
from kka_ray.detectors.training import train
from kka_ray.encoders.state import part
from kka_ray.features.base import Features

_PATCH = "patch"
_CHUNK = 128
_PATCH_CHUNK = 8
"""Images whose patches are scored at a time: what lies between the layers stays in the cache."""
_MANY = 1000
"""Normals from which on the learning rate is the configured one."""
_OTHER_SEED = 0x616E6F6D
_PATCH_ANOMALIES = 16
"""Anomaly images a step in the patch branch: all their patches are scored to find the most anomalous."""


class SimpleNetDetector(Detector):
    """Discriminators of whole images, of which the mean counts, and one of patches, whose outputs are added up."""

    needs_patches: ClassVar[bool] = True

    def __init__(self, config: SimpleNet | PixelSimpleNet) -> None:
        self.config = config
        self._branches: dict[str, Branch] = {}
        self._trust = 1.0
        """What `patch_weight` is multiplied by: how far the branch of patches can be believed, 0..1."""
        self._caution = 1.0
        """What the learning rate is multiplied by: few normals are soon known by heart."""

    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Trains both branches. Raises ValueError if features come without patches."""
        if anomalies is not None and len(anomalies) == 0:
            anomalies = None
        for features in (normals, validation, *([anomalies] if anomalies is not None else [])):
            patch_rows(features, "SimpleNet")
        self._caution = min(1.0, len(normals) / _MANY)
        draws = _Draws.of(seed)
        self._branches = {name: self._fit_image(name, normals, anomalies, draws) for name in self._images}
        self._branches[_PATCH] = self._fit_patch(normals, anomalies, draws)
        # -margin is where normals were to lie, 0 the boundary, +margin where anomalies were to lie.
        worst = float(np.median(self._patch_scores(validation).max((1, 2))))
        self._trust = float(np.clip(1 - worst / self.config.margin, 0, 1))

    def _fit_image(self, name: str, normals: Features, anomalies: Features | None, draws: _Draws) -> Branch:
        config = self.config
        x = torch.from_numpy(normals.statistics())
        branch = self._new_branch(x.shape[1])
        blocks = (normals.pooled.shape[1], x.shape[1] - normals.pooled.shape[1])
        branch.start(x, config.shrinkage, config.noise, config.margin, draws.normals, blocks)
        x = branch.standardise(x)
        if normals.views is not None:
            # Views of anomalies alone would teach the discriminator what a view is.
            x = torch.cat([x, branch.standardise(torch.from_numpy(normals.views.statistics()))])
        if anomalies is None:
            self._train(name, branch, len(x), lambda rows: x[rows], None, draws)
            return branch
        labelled = anomalies.with_views()
        known = branch.standardise(torch.from_numpy(labelled.statistics()))
        drawn = _random_rows(labelled, config.batch, draws.anomalies)
        self._train(name, branch, len(x), lambda rows: x[rows], lambda: known[drawn()], draws)
        return branch

    def _fit_patch(self, normals: Features, anomalies: Features | None, draws: _Draws) -> Branch:
        config, grid = self.config, patch_rows(normals, "SimpleNet")
        branch = self._new_branch(grid.shape[2])
        sample = _sample_patches(grid, draws.normals)
        branch.start(sample, config.shrinkage, config.noise, config.margin, draws.normals)

        def pick(rows: Tensor) -> Tensor:
            places = torch.randint(grid.shape[1], (len(rows), config.patches_per_image), generator=draws.normals)
            return branch.standardise(grid[rows[:, None], places].flatten(0, 1))

        negatives = _worst_patches(branch, anomalies, config.anomaly_patches, draws.anomalies)
        self._train(_PATCH, branch, len(grid), pick, negatives, draws)
        return branch

    def score(self, features: Features) -> np.ndarray:
        """Mean -D of the image plus -D of its worst patch, times `patch_weight` and the trust in that branch."""
        whole = torch.from_numpy(features.statistics()).split(_CHUNK)
        members = [self._branches[name] for name in self._images]
        with torch.no_grad():
            image = torch.cat([-_mean(members, x) for x in whole]).numpy()
        total: np.ndarray = image + self._patch_weight * self._patch_scores(features).max((1, 2))
        return total.astype(np.float32)

    def heatmap(self, features: Features) -> np.ndarray:
        """-D of each patch."""
        return self._patch_scores(features)

    def network(self) -> nn.Module:
        members = [self._branches[name] for name in self._images]
        return _Score(members, self._branches[_PATCH], self._patch_weight)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"{name}.{k}": v for name, b in self._branches.items() for k, v in b.state_dict().items()}, {
            "trust": self._trust
        }

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        self._trust = values["trust"]
        for name in (*self._images, _PATCH):
            own = part(tensors, name)
            branch = self._new_branch(len(own["mean"]))
            branch.load_state_dict(own)
            self._branches[name] = branch.requires_grad_(False)
        return self

    @property
    def _images(self) -> list[str]:
        """Names of the branches of whole images."""
        return [f"image-{k}" for k in range(self.config.members)]

    @property
    def _patch_weight(self) -> float:
        return self.config.patch_weight * self._trust

    def _new_branch(self, channels: int) -> Branch:
        width = min(self.config.width, channels)
        return Branch(channels, width, min(self.config.hidden, 2 * width) // 2 * 2)

    def _train(
        self,
        name: str,
        branch: Branch,
        count: int,
        pick: Callable[[Tensor], Tensor],
        negatives: Callable[[], Tensor] | None,
        draws: _Draws,
    ) -> None:
        """Trains with the standardised features that `pick` gives for each batch of `count` images' rows."""
        config = self.config
        rate = config.learning_rate * self._caution
        # The adaptor moves at a tenth of the rate, as in the authors' code.
        groups: list[dict[str, Any]] = [
            {"params": [*branch.adaptor.parameters()], "lr": rate / 10},
            {"params": [*branch.hidden.parameters(), *branch.tail.parameters()]},
        ]
        optimizer = torch.optim.Adam(groups, lr=rate, weight_decay=1e-5, fused=True)

        def epoch(step: Callable[[], None]) -> None:
            for rows in torch.randperm(count, generator=draws.normals).split(config.batch):
                x = pick(rows)
                noise = config.noise * torch.randn(len(x), branch.adaptor.out_features, generator=draws.normals)
                against = x[:0] if negatives is None else _mix(negatives(), draws.anomalies)
                weights = (1 / len(x), config.anomaly_weight / max(len(against), 1))
                own, others = self.training.rows(len(x)), self.training.rows(len(against))
                branch.set_gradients(x[own], noise[own], against[others], weights, config.margin)
                step()

        steps = -(-count // config.batch)
        train(name, branch, optimizer, config.epochs, steps, epoch, [draws.normals, draws.anomalies], self.training)
        branch.requires_grad_(False)

    @torch.no_grad()
    def _patch_scores(self, features: Features) -> np.ndarray:
        branch = self._branches[_PATCH].folded()
        scores = [-branch(x.float()) for x in patch_rows(features, "SimpleNet").split(_PATCH_CHUNK)]
        return on_grid(torch.cat(scores), features)


@dataclass(frozen=True)
class _Draws:
    """What a fit draws from: what normals are drawn does not depend on whether there are anomalies."""

    normals: torch.Generator
    anomalies: torch.Generator

    @classmethod
    def of(cls, seed: int) -> Self:
        return cls(*(torch.Generator().manual_seed(s) for s in (seed, seed ^ _OTHER_SEED)))


def _mean(members: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Mean D (N,) of features (N, C)."""
    return torch.stack([member(x) for member in members]).mean(0)


def _sample_patches(grid: Tensor, generator: torch.Generator, limit: int = 100_000) -> Tensor:
    flat = grid.reshape(-1, grid.shape[2])
    return flat[torch.randperm(len(flat), generator=generator)[:limit]].float()


def _mix(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random points between the rows of x (N, C) and others of them: a few anomalies are soon known by heart."""
    share = torch.rand(len(x), 1, generator=generator)
    return share * x + (1 - share) * x[torch.randperm(len(x), generator=generator)]


def _random_rows(anomalies: Features, count: int, generator: torch.Generator) -> Callable[[], Tensor]:
    """Draws `count` rows, each in proportion to its weight."""
    if anomalies.weights is None:
        return lambda: torch.randint(len(anomalies), (count,), generator=generator)
    weights = torch.from_numpy(anomalies.relative_weights())
    return lambda: torch.multinomial(weights, count, replacement=True, generator=generator)


def _worst_patches(
    branch: Branch, anomalies: Features | None, most: int, generator: torch.Generator
) -> Callable[[], Tensor] | None:
    """The `most` most anomalous patches of random anomaly images: the rest of such an image is mostly normal."""
    if anomalies is None:
        return None
    grid, rows = patch_rows(anomalies, "SimpleNet"), _random_rows(anomalies, _PATCH_ANOMALIES, generator)

    @torch.no_grad()
    def pick() -> Tensor:
        images = branch.standardise(grid[rows()])
        places = branch.discriminate(branch.adaptor(images)).topk(min(most, images.shape[1]), largest=False).indices
        return images.gather(1, places[..., None].expand(-1, -1, images.shape[2])).flatten(0, 1)

    return pick


class _Score(nn.Module):
    """`SimpleNetDetector.score` of pooled and patch features."""

    def __init__(self, images: Sequence[Branch], patch: Branch, patch_weight: float) -> None:
        super().__init__()
        self.images, self.patch, self.patch_weight = nn.ModuleList(images), patch, patch_weight

    def forward(self, pooled: Tensor, patches: Tensor) -> Tensor:
        grid = patches.flatten(1, 2)
        mean = grid.mean(1, keepdim=True)
        deviation = (grid - mean).square().mean(1).sqrt()
        whole = torch.cat([pooled, mean.squeeze(1), deviation, grid.amax(1)], 1)
        return -_mean(self.images, whole) + self.patch_weight * (-self.patch(grid)).amax(1)
