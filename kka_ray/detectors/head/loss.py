"""Losses of the trained heads, each of one row; a head's loss is the mean over normals plus that over anomalies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(log_odds: Tensor, *, normal: bool) -> Tensor:
    """-log of the probability of what the rows are, from log-odds (N,) of an anomaly."""
    return F.softplus(log_odds if normal else -log_odds)


def energy(logits: Tensor) -> Tensor:
    """E (N,) = -log sum exp of logits (N, K), at temperature 1: low where some output is large."""
    return -torch.logsumexp(logits, dim=1)


def squared_hinge(energies: Tensor, bound: float, *, normal: bool) -> Tensor:
    """max(0, E - bound)^2 of normals, max(0, bound - E)^2 of anomalies; energies E (N,)."""
    return (energies - bound if normal else bound - energies).clamp_min(0).square()
