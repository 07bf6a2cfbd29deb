"""SimpleNet's loss."""

from __future__ import annotations

from torch import Tensor


def truncated_l1(outputs: Tensor, margin: float, *, normal: bool) -> Tensor:
    """Mean of max(0, margin - D) for normals, of max(0, margin + D) for negatives; outputs D of any shape."""
    return (margin + (-outputs if normal else outputs)).clamp_min(0).mean()
