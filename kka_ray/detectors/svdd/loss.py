"""The soft boundary of a sphere; distances are squared, (N,), and losses of one row each."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_radius(distances: Tensor, nu: float) -> float:
    """R^2 that leaves the share `nu` of the distances outside: there R^2 + mean max(0, d - R^2) / nu is least."""
    return float(torch.quantile(distances, 1 - nu))


def beyond(distances: Tensor, radius: float, nu: float) -> Tensor:
    """max(0, d - R^2) / nu, of normals."""
    return (distances - radius).clamp_min(0) / nu


def short_of(distances: Tensor, radius: float, margin: float) -> Tensor:
    """max(0, (1 + margin) R^2 - d), of anomalies."""
    return ((1 + margin) * radius - distances).clamp_min(0)
