"""States of several modules in one safetensors file, told apart by what their names begin with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors called `NAME.…`, without that beginning."""
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
