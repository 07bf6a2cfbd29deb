"""The authors' SimpleNet (github.com/DonaldRR/SimpleNet) on our backbone, from a checkout that the user names.

Nothing of it is part of this repository. Its module imports tools for plots and for pixel-wise measures that are not
needed here; they are replaced by empty modules.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = ("_blocks.4", "_blocks.10")
"""The last blocks of stride 8 and 16."""


class _NoWriter:
    def __init__(self, **_: Any) -> None: ...

    def add_scalar(self, *_: Any) -> None: ...


def load(checkout: Path, network: nn.Module, size: int, width: int, hidden: int, noise: float) -> Any:
    """Their model with the settings of their run.sh, but for `width` and `hidden`."""
    board, utils = ModuleType("torch.utils.tensorboard"), ModuleType("utils")
    board.SummaryWriter = _NoWriter  # type: ignore[attr-defined]
    utils.plot_segmentation_images = None  # type: ignore[attr-defined]
    stand_ins = {"torch.utils.tensorboard": board, "utils": utils, "metrics": ModuleType("metrics")}
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(checkout))
    try:
        import simplenet
    finally:
        sys.path.remove(str(checkout))
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    model = simplenet.SimpleNet(torch.device("cpu"))
    model.load(
        network,
        LAYERS,
        torch.device("cpu"),
        (3, size, size),
        pretrain_embed_dimension=width,
        target_embed_dimension=width,
        patchsize=3,
        meta_epochs=40,
        gan_epochs=1,
        noise_std=noise,
        dsc_hidden=hidden,
        dsc_layers=2,
        dsc_margin=0.5,
        pre_proj=1,
    )
    model.logger = simplenet.TBWrapper("")
    return model


def batches(images: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Images as their training loop takes them."""
    order = torch.randperm(len(images))
    return [{"image": images[rows]} for rows in order.split(size)]


def scores(model: Any, images: Tensor, batch: int) -> list[float]:
    """Image scores, as their `predict` gives them."""
    out: list[float] = []
    for part in images.split(batch):
        out += _flat(model.predict(part)[0])
    return out


def _flat(values: Iterable[Any]) -> list[float]:
    return [float(v) for v in values]
