"""Magnetic tile surface defects: tiles without a defect are normal; exposures of one tile stay together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc

from kka_ray.config.models import MagneticTileData
from kka_ray.data.base import DataModule, ImageSet, Normals
from kka_ray.data.captions import fill
from kka_ray.data.parquet import decode_rows, read_rows, shards
from kka_ray.data.splits import draw_groups, drop_seen, split_by_group
from kka_ray.errors import ConfigError, DataError

TEMPLATES = (
    "a photo of {}",
    "a close-up of {}",
    "a grey photo of {} without a defect",
    "a photo of the smooth surface of {}",
)

_NORMAL = 0
_COLUMNS = ["image", "label", "class_name", "source", "group"]


class MagneticTileModule(DataModule):
    """Normals: pictures labelled `free` of tiles all of whose exposures are free. Test: the rest.

    A group holds the exposures of one tile, to which different labels were given at times: such a tile is for testing
    only, with its free exposures as normals. Of the other free tiles the share `test` is tested on and the share
    `validation` validated on, drawn from the seed. The set has no official split and one file, of which `normals` reads
    the labels and the pictures of free tiles. Captions are templates, since the set has none.
    """

    subject = "magnetic tiles"
    normal_terms = ()

    def __init__(self, config: MagneticTileData, seed: int) -> None:
        """Raises ConfigError if nothing is left to train on."""
        if config.test + config.validation >= 1:
            raise ConfigError(
                f"data.test {config.test} and data.validation {config.validation} leave no tile to train on: their sum "
                "must be less than 1"
            )
        self.config = config
        self.seed = seed

    def look(self) -> None:
        """See `DataModule.look`."""
        shards(self.config.path, "all")

    def normals(self) -> Normals:
        """See `DataModule.normals`."""
        return self._normals

    @cached_property
    def _parts(self) -> dict[str, str]:
        """Part (`train`, `validation`, `test`) of each group."""
        labels: dict[str, set[int]] = {}
        for row in read_rows(shards(self.config.path, "all"), ["label", "group"]):
            labels.setdefault(row["group"], set()).add(row["label"])
        free = {group for group, found in labels.items() if found == {_NORMAL}}
        if not free:
            raise DataError(f"{self.config.path}: no group has normal pictures only (label {_NORMAL}); see `group`")
        test = draw_groups(free, round(self.config.test * len(free)), self.seed, "test")
        wanted = max(1, round(self.config.validation * len(free)))
        validation = draw_groups(free - test, wanted, self.seed, "validation")
        return {
            group: "test" if group in test or group not in free else "validation" if group in validation else "train"
            for group in labels
        }

    @cached_property
    def _normals(self) -> Normals:
        used = [group for group, part in self._parts.items() if part != "test"]
        rows = read_rows(shards(self.config.path, "all"), _COLUMNS, pc.field("group").isin(used))
        is_validation = [self._parts[row["group"]] == "validation" for row in rows]
        return split_by_group(self._image_set(rows), is_validation, str(self.config.path))

    def test(self) -> ImageSet:
        """Every picture of the groups that are tested on, minus copies of the normals."""
        tested = [group for group, part in self._parts.items() if part == "test"]
        rows = read_rows(shards(self.config.path, "all"), _COLUMNS, pc.field("group").isin(tested))
        kept, seen = drop_seen(self._image_set(rows), self.normals())
        self.test_dropped = {"duplicate": seen}
        return kept

    def _image_set(self, rows: Sequence[dict[str, Any]]) -> ImageSet:
        return ImageSet(
            tuple(row["source"] for row in rows),
            decode_rows(rows, self.config.path),
            fill(TEMPLATES, ["magnetic tile"] * len(rows), self.seed),
            tuple(row["class_name"] for row in rows),
            np.array([row["label"] != _NORMAL for row in rows], bool),
        )
