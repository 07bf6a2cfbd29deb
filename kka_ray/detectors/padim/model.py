"""PaDiM: Mahalanobis distance of each patch to the normal patches at its place."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from kka_ray.config.models import Mahalanobis, Padim
from kka_ray.detectors.base import Detector
from kka_ray.detectors.mahalanobis.gaussian import moments, shrunk_factor
from kka_ray.detectors.mahalanobis.model import MahalanobisDetector
from kka_ray.detectors.patches import Fusion, on_grid, patch_rows
from kka_ray.features.base import Features

_CHUNK = 128  # images


class PadimDetector(Detector):
    """A Gaussian at each place of the patch grid, and one of whole images beside them; anomalies are ignored."""

    needs_patches: ClassVar[bool] = True
    ignores_anomalies: ClassVar[bool] = True

    def __init__(self, config: Padim) -> None:
        self.config = config
        self._channels = torch.empty(0, dtype=torch.int64)
        self._mean = torch.empty(0, 0)
        self._whitening = torch.empty(0, 0, 0)
        self._image = MahalanobisDetector(Mahalanobis(kind="mahalanobis", shrinkage=config.shrinkage))
        self._fusion: Fusion | None = None

    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Mean and covariance at each place; the seed decides which channels are kept.

        Raises ValueError if features come without patches, DataError if the normals are fewer than two or all equal.
        """
        grid = patch_rows(normals, "PaDiM")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(grid.shape[2], generator=generator)
        self._channels = order[: self.config.channels].sort().values
        fitted = [moments(grid[:, place, self._channels].double()) for place in range(grid.shape[1])]
        mean, covariance = (torch.stack(part) for part in zip(*fitted, strict=True))
        factor = shrunk_factor(covariance, self.config.shrinkage, len(normals))
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype)
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        self._mean, self._whitening = mean, inverse.contiguous()
        self._fusion = None
        if self.config.image_weight:
            self._image.fit(normals, None, validation, seed)
            self._fusion = Fusion.of(self._patch_scores(validation), self._image.score(validation))

    def score(self, features: Features) -> np.ndarray:
        """The patch score, and where `image_weight` is not 0 that of the whole image, both in MADs of the normals."""
        patch = self._patch_scores(features)
        if self._fusion is None:
            return patch
        return self._fusion(patch, self._image.score(features), self.config.image_weight)

    def heatmap(self, features: Features) -> np.ndarray:
        """The distance at each place; about sqrt(channels) for a typical normal."""
        return on_grid(self._distances(features), features)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"channels": self._channels, "mean": self._mean, "whitening": self._whitening}
        of_image, _ = self._image.state()
        tensors |= {f"image.{name}": tensor for name, tensor in of_image.items()}
        return tensors, {"fusion": asdict(self._fusion) if self._fusion else None}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        self._channels, self._mean, self._whitening = tensors["channels"], tensors["mean"], tensors["whitening"]
        self._image.restore({"mean": tensors["image.mean"], "factor": tensors["image.factor"]}, {})
        self._fusion = Fusion.restore(values["fusion"])
        return self

    def _patch_scores(self, features: Features) -> np.ndarray:
        """The distance at the worst place."""
        return self._distances(features).amax(1).numpy()

    def _distances(self, features: Features) -> Tensor:
        out = []
        for patches in patch_rows(features, "PaDiM").split(_CHUNK):
            centred = patches[..., self._channels].double() - self._mean
            white = self._whitening @ centred.permute(1, 2, 0)  # (places, channels, images)
            out.append(white.norm(dim=1).T.float())
        return torch.cat(out)
