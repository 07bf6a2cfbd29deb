"""Normal images in: splits that cannot leak, captions, one file a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kka_ray.config.models import Data
from kka_ray.data.base import DataModule
from kka_ray.data.cifar100 import Cifar100Module
from kka_ray.data.flowers_module import FlowersModule
from kka_ray.data.folder import FolderModule
from kka_ray.data.magnetic_tile import MagneticTileModule
from kka_ray.data.oxford102 import Oxford102Module
from kka_ray.data.ucm_captions import UcmCaptionsModule

MODULES: dict[str, Callable[[Any, int], DataModule]] = {
    "flowers": FlowersModule,
    "cifar100": Cifar100Module,
    "oxford102": Oxford102Module,
    "ucm_captions": UcmCaptionsModule,
    "magnetic_tile": MagneticTileModule,
    "folder": FolderModule,
}
"""The data sets, by the `kind` of their configuration."""


def open_data(config: Data, seed: int) -> DataModule:
    """The data set that `config` names. Splits, folds and captions follow from `seed`, 0 or more.

    Raises ConfigError or DataError if the configuration does not fit the data set.
    """
    return MODULES[config.kind](config, seed)
