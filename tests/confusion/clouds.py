"""Synthetic features: normals and anomalies at graded distances."""

from __future__ import annotations

import numpy as np

DIMENSIONS = 48


def cloud(count: int, distance: float, seed: int) -> np.ndarray:
    """Unit-variance points about a fixed mean, moved by `distance` in a random direction each."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(count, DIMENSIONS))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    points = rng.normal(size=(count, DIMENSIONS)) * 0.3 + distance * direction
    return (points + 3 * np.eye(DIMENSIONS)[0]).astype(np.float32)
