"""What a backbone makes of images, and what detectors and evaluators read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Features:
    """Features of N images.

    pooled: float32 (N, D), global average of the last feature map, L2-normalised.
    patches: float16 (N, h, w, C), the feature maps of the middle stages, brought to one grid; None if not asked for.
    """

    pooled: np.ndarray
    patches: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pooled)

    def take(self, rows: Sequence[int] | np.ndarray) -> Features:
        """The given rows, in that order."""
        pick = np.asarray(rows, dtype=np.int64)
        return Features(self.pooled[pick], None if self.patches is None else self.patches[pick])

    @staticmethod
    def join(parts: Sequence[Features]) -> Features:
        """Features of several sets, one after the other; all with patches or all without."""
        patches = [p.patches for p in parts]
        with_patches = all(p is not None for p in patches)
        return Features(
            np.concatenate([p.pooled for p in parts]),
            np.concatenate(patches) if with_patches else None,  # type: ignore[arg-type]
        )
