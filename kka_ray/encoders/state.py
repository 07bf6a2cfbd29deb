"""States of several modules and optimizers in one safetensors file, told apart by what their names begin with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors called `NAME.…`, without that beginning."""
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimizer, called `PARAMETER.NAME`. Its learning rates and the like are not among them."""
    return {
        f"{index}.{name}": torch.as_tensor(value).contiguous()
        for index, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts what `optimizer_state` gave in place."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
