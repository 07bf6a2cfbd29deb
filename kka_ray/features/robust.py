"""Standardisation by median and MAD, which a few odd images do not move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

_TINY = 1e-6
"""Least MAD, as a share of the median's size: scores of equal images differ by rounding only."""


@dataclass(frozen=True)
class Robust:
    """Median and median absolute deviation of some scores."""

    median: float
    mad: float

    @classmethod
    def of(cls, scores: np.ndarray) -> Self:
        """Of scores (N,), N >= 1. The MAD is never 0, so equal scores give finite values."""
        median = float(np.median(scores))
        mad = float(np.median(np.abs(scores.astype(np.float64) - median)))
        return cls(median, max(mad, _TINY * max(abs(median), 1.0)))

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Scores of any shape in MADs above the median, float64."""
        return (scores.astype(np.float64) - self.median) / self.mad
