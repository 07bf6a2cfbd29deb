"""SimpleNet's loss, of which training needs the slope only."""

from __future__ import annotations

from torch import Tensor


def truncated_l1(outputs: Tensor, margin: float, *, normal: bool) -> Tensor:
    """max(0, margin - D) of normals, max(0, margin + D) of negatives; outputs D of any shape."""
    return (margin + (-outputs if normal else outputs)).clamp_min(0)


def slope(outputs: Tensor, signs: Tensor, margin: float) -> Tensor:
    """Derivative of `truncated_l1` with respect to D, (N,). `signs` (N,) is 1 for normals and -1 for negatives."""
    return -signs * (signs * outputs < margin)
