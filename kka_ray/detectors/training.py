"""How a detector's gradient steps are run: in one process, or shared by several; and how they go on after a break."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from kka_ray.encoders.state import optimizer_state, part, restore_optimizer


class Training:
    """Gradient steps in one process, without checkpoints. `kka_ray.cluster.fits` shares and keeps them.

    Every worker draws the same batches from the same generator, computes the gradients of its `rows` of each, divided
    by the size of the whole batch, and adds them to those of the others. So the number of workers changes no more than
    the order of additions.
    """

    def rows(self, count: int) -> slice:
        """This worker's part of a batch of `count` rows; the parts of all workers cover it once. It may be empty."""
        return slice(0, count)

    def add(self, gradients: Iterable[Tensor]) -> None:
        """Replaces each gradient by its sum over the workers; every worker calls it with the same ones."""

    def read(self, name: str) -> bytes | None:
        """The latest checkpoint kept under `name`, None if there is none."""
        return None

    def keep(self, name: str, content: Callable[[], bytes]) -> None:
        """Offers a checkpoint; whether it is written may depend on how long ago the last one was."""


ALONE = Training()


def train(
    name: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    steps: int,
    epoch: Callable[[Callable[[], None]], None],
    generators: Sequence[torch.Generator],
    training: Training,
) -> None:
    """Runs `epoch(step)` `epochs` times. It sets the gradients of `steps` batches and calls `step` after each.

    `step` adds up the gradients of the workers and moves the parameters, at a rate that falls from the optimizer's own
    to 0 on a cosine. `generators` are all that an epoch draws from. Training goes on after the last epoch that was kept
    under `name`, with the same result.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    done = 0
    content = training.read(name)
    if content is not None:
        done = _restore(load(content), module, optimizer, generators)
    taken = done * steps

    def step() -> None:
        nonlocal taken
        training.add([p.grad for p in parameters if p.grad is not None])
        share = (1 + math.cos(math.pi * taken / (epochs * steps))) / 2
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        optimizer.step()
        optimizer.zero_grad()
        taken += 1

    for number in range(done, epochs):
        epoch(step)
        training.keep(name, lambda done=number + 1: save(_state(done, module, optimizer, generators)))  # type: ignore[misc]


def _state(
    done: int, module: nn.Module, optimizer: torch.optim.Optimizer, generators: Sequence[torch.Generator]
) -> dict[str, Tensor]:
    tensors = {f"module.{k}": v.detach().clone() for k, v in module.state_dict().items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizer_state(optimizer).items()}
    tensors |= {f"generator.{k}": g.get_state() for k, g in enumerate(generators)}
    return tensors | {"epochs": torch.tensor(done)}


def _restore(
    tensors: dict[str, Tensor],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Sequence[torch.Generator],
) -> int:
    """Puts a checkpoint in place and returns the number of its epochs."""
    module.load_state_dict(part(tensors, "module"))
    restore_optimizer(optimizer, part(tensors, "optimizer"))
    for k, generator in enumerate(generators):
        generator.set_state(tensors[f"generator.{k}"])
    return int(tensors["epochs"])
