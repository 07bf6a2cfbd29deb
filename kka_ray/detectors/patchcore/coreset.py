"""Greedy k-center selection, in a random projection."""

from __future__ import annotations

import torch
from torch import Tensor


def project(x: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Rows of x (N, D) projected at random to `width` dimensions, distances kept on average; x itself if D <= width."""
    if x.shape[1] <= width:
        return x
    return x @ (torch.randn(x.shape[1], width, generator=generator) / width**0.5)


def greedy_centers(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (min(count, N),) of rows of x (N, D), float32: each is the row farthest from those before it.

    The first one is random. This is the greedy 2-approximation of the k-center problem: no row is farther from its
    nearest center than twice the least possible. Equal rows are taken only once the different ones are used up.
    """
    x = x - x.mean(0)  # distances are differences of squares: near the origin they lose least
    squares = x.square().sum(1)
    nearest = torch.full((len(x),), float("inf"))
    picked = torch.randint(len(x), (1,), generator=generator)
    centers = []
    for _ in range(min(count, len(x))):
        centers.append(picked)
        index = int(picked)
        distance = torch.addmv(squares, x, x[index], alpha=-2).add_(squares[index]).clamp_min_(0)
        torch.minimum(nearest, distance, out=nearest)
        nearest[index] = -1  # never twice
        picked = nearest.argmax(keepdim=True)
    return torch.cat(centers)
