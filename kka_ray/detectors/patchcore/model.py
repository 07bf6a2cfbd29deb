"""PatchCore: distance of patches to a coreset of normal ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from kka_ray.config.models import PatchCore
from kka_ray.detectors.base import Detector
from kka_ray.detectors.knn.model import distances
from kka_ray.detectors.patchcore.coreset import greedy_centers, project
from kka_ray.detectors.patches import Fusion, on_grid, patch_rows
from kka_ray.features.base import Features

_CHUNK = 64
"""Images at a time, fewer where `_DISTANCES` asks for it."""
_DISTANCES = 2**24
"""Distances at a time: 64 MB of them."""


class PatchCoreDetector(Detector):
    """A memory of normal patches, and k-NN of whole images beside it; anomalies are ignored."""

    needs_patches: ClassVar[bool] = True
    ignores_anomalies: ClassVar[bool] = True

    def __init__(self, config: PatchCore) -> None:
        self.config = config
        self._memory = torch.empty(0, 0)
        self._around = torch.empty(0, 0, dtype=torch.int64)
        self._normals = torch.empty(0, 0)
        self._fusion: Fusion | None = None

    def fit(self, normals: Features, anomalies: Features | None, validation: Features, seed: int) -> None:
        """Picks the memory; the seed decides the projection and the first patch.

        Raises ValueError if features come without patches.
        """
        generator = torch.Generator().manual_seed(seed)
        flat = patch_rows(normals, "PatchCore").flatten(0, 1)
        size = max(1, round(self.config.coreset * len(flat)))
        if len(flat) > self.config.candidates:
            flat = flat[torch.randperm(len(flat), generator=generator)[: self.config.candidates]]
        x = flat.float()
        self._memory = x[greedy_centers(project(x, self.config.projection, generator), size, generator)]
        count = min(self.config.neighbours, len(self._memory))
        parts = self._memory.split(max(1, _DISTANCES // len(self._memory)))
        self._around = torch.cat([torch.cdist(x, self._memory).topk(count, largest=False).indices for x in parts])
        self._fusion = None
        if self.config.image_weight:
            self._normals = torch.from_numpy(normals.pooled.astype(np.float64))
            self._fusion = Fusion.of(self._patch_scores(validation), self._image_scores(validation))

    def score(self, features: Features) -> np.ndarray:
        """The patch score, and where `image_weight` is not 0 that of the whole image, both in MADs of the normals."""
        patch = self._patch_scores(features)
        if self._fusion is None:
            return patch
        return self._fusion(patch, self._image_scores(features), self.config.image_weight)

    def heatmap(self, features: Features) -> np.ndarray:
        """Euclidean distance of each patch to the nearest one in memory."""
        parts = [self._nearest(x.float())[0] for x in self._chunks(features)]
        return on_grid(torch.cat(parts), features)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"memory": self._memory, "around": self._around, "normals": self._normals.float()}
        return tensors, {"fusion": asdict(self._fusion) if self._fusion else None}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        self._memory, self._around, self._normals = tensors["memory"], tensors["around"], tensors["normals"].double()
        self._fusion = Fusion.restore(values["fusion"])
        return self

    def _image_scores(self, features: Features) -> np.ndarray:
        return distances(features.pooled, self._normals, self.config.image_neighbours)

    def _patch_scores(self, features: Features) -> np.ndarray:
        """The distance of the worst patch, less where other memories are as near to it as the nearest."""
        out = []
        for patches in self._chunks(features):
            x = patches.float()
            distance, nearest = self._nearest(x)
            worst = distance.argmax(1, keepdim=True)
            patch = x.gather(1, worst[..., None].expand(-1, -1, x.shape[2]))
            out.append(self._reweighted(patch, distance.gather(1, worst), nearest.gather(1, worst)))
        return torch.cat(out).numpy()

    def _chunks(self, features: Features) -> Sequence[Tensor]:
        """Patches (n, P, C) of a few images at a time."""
        rows = patch_rows(features, "PatchCore")
        return rows.split(min(_CHUNK, max(1, _DISTANCES // (rows.shape[1] * len(self._memory)))))

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distance of patches (N, P, C) to their nearest memory (N, P), and its index.

        The nearest is found by a matrix product; its distance is then computed anew, as a sum of squared differences:
        a difference of squares would depend on the batch.
        """
        flat = x.flatten(0, 1)
        nearest = torch.addmm(self._memory.square().sum(1), flat, self._memory.T, alpha=-2).argmin(1)
        distance = (flat - self._memory[nearest]).norm(dim=1)
        return distance.reshape(x.shape[:2]), nearest.reshape(x.shape[:2])

    def _reweighted(self, patch: Tensor, distance: Tensor, nearest: Tensor) -> Tensor:
        """Eq. 7 of the paper: 1 - softmax of the distances to the memories around the nearest one; all (N, 1, ...)."""
        if self._around.shape[1] < 2:
            return distance[:, 0]
        around = self._around[nearest[:, 0]]
        others = (patch - self._memory[around]).norm(dim=2)
        share = torch.exp(distance[:, 0] - torch.logsumexp(others, 1))
        return distance[:, 0] * (1 - share)
