"""What a backbone makes of images, and what detectors and evaluators read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch


@dataclass(frozen=True)
class Features:
    """Features of N images.

    pooled: float32 (N, D), global average of the last feature map, L2-normalised.
    patches: float16 (N, h, w, C), the feature maps of the middle stages, brought to one grid; None if not asked for.
    views: features of augmented views of the images, any number of them; None if there are none. They are for learning
        from anomalies, and belong to the whole set: `take` and `join` leave them out.
    pixels: uint8 (N, 32, 32, 3), the images themselves, resized, for networks that learn without a backbone; None if
        not asked for.
    weights: float32 (N,), positive, how much each image counts where anomalies are learned from; None: all alike. Only
        their ratios matter. A view counts as much as its image.
    """

    pooled: np.ndarray
    patches: np.ndarray | None = None
    views: Features | None = None
    pixels: np.ndarray | None = None
    weights: np.ndarray | None = None

    @classmethod
    def of_pixels(cls, pixels: np.ndarray) -> Self:
        """Of images uint8 (N, 32, 32, 3) alone: the pooled features have no dimensions."""
        return cls(np.zeros((len(pixels), 0), np.float32), pixels=pixels)

    def __len__(self) -> int:
        return len(self.pooled)

    def need_pixels(self, reader: str) -> np.ndarray:
        """`pixels`. Raises ValueError, naming who reads them, if there are none."""
        if self.pixels is None:
            raise ValueError(f"{reader} reads pixels: extract with pixels=True")
        return self.pixels

    def with_views(self) -> Features:
        """The images followed by their views."""
        if self.views is None:
            return self
        views = self.views
        if self.weights is not None:
            views = replace(views, weights=self.weights.repeat(len(views) // len(self)))
        return Features.join([self, views])

    def relative_weights(self) -> np.ndarray:
        """`weights` with a mean of 1, float32 (N,); ones where there are none."""
        if self.weights is None:
            return np.ones(len(self), np.float32)
        return (self.weights / self.weights.mean()).astype(np.float32)

    def statistics(self) -> np.ndarray:
        """Pooled features with mean, standard deviation and maximum over places of each patch channel, (N, D + 3 C).

        What the last map has forgotten, such as fine shapes and patterns, the middle stages still tell. Without patches
        the pooled features alone. float32.
        """
        return self._statistics

    @cached_property
    def _statistics(self) -> np.ndarray:
        if self.patches is None:
            return self.pooled
        parts = []
        for some in torch.from_numpy(self.patches).flatten(1, 2).split(256):
            grid = some.float()
            mean = grid.mean(1)
            deviation = (grid - mean[:, None]).square_().mean(1).sqrt_()
            parts.append(torch.cat([mean, deviation, grid.amax(1)], 1).numpy())
        return np.concatenate([self.pooled, *([np.concatenate(parts)] if parts else [])], axis=1)

    def take(self, rows: Sequence[int] | np.ndarray) -> Features:
        """The given rows, in that order."""
        pick = np.asarray(rows, dtype=np.int64)
        return Features(
            self.pooled[pick],
            None if self.patches is None else self.patches[pick],
            pixels=None if self.pixels is None else self.pixels[pick],
            weights=None if self.weights is None else self.weights[pick],
        )

    @staticmethod
    def join(parts: Sequence[Features]) -> Features:
        """Features of several sets, one after the other. What one of them lacks (patches, pixels) is left out."""
        return Features(
            np.concatenate([p.pooled for p in parts]),
            _joined([p.patches for p in parts]),
            pixels=_joined([p.pixels for p in parts]),
            weights=_joined([p.weights for p in parts]),
        )


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    present = [p for p in parts if p is not None]
    return np.concatenate(present) if len(present) == len(parts) else None
