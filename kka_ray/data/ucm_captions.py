"""UC Merced land use with human captions: split by scene, because neighbouring pictures overlap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc

from kka_ray.config.models import UcmData
from kka_ray.data.base import DataModule, ImageSet, Normals
from kka_ray.data.parquet import decode_rows, read_rows, shards
from kka_ray.data.splits import draw_groups, drop_seen, split_by_group, stream
from kka_ray.errors import ConfigError, DataError

CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("fields", ("field", "farmland", "cropland")),
    ("airplanes", ("airplane", "plane", "aircraft")),
    ("baseball diamonds", ("baseball diamond", "baseball field")),
    ("beaches", ("beach",)),
    ("buildings", ("building",)),
    ("chaparral", ("chaparral",)),
    ("dense residential areas", ("dense residential area",)),
    ("forests", ("forest",)),
    ("freeways", ("freeway",)),
    ("golf courses", ("golf course",)),
    ("harbors", ("harbor",)),
    ("intersections", ("intersection",)),
    ("medium residential areas", ("medium residential area",)),
    ("mobile home parks", ("mobile home park",)),
    ("overpasses", ("overpass",)),
    ("parking lots", ("parking lot",)),
    ("rivers", ("river",)),
    ("runways", ("runway",)),
    ("sparse residential areas", ("sparse residential area",)),
    ("storage tanks", ("storage tank", "oil tank", "tank")),
    ("tennis courts", ("tennis court",)),
)
"""By label: the class in plain words, and names of one of its objects for the guard."""

SCENE = 10
"""Consecutive pictures that are kept together."""

_CLASS_SIZE = 100
_COLUMNS = ["image", "label", "class_name", "source", "captions", "caption_id"]


class UcmCaptionsModule(DataModule):
    """Normals: the classes `labels`. Test: their held-out scenes, and the other classes of the official test split.

    A scene is a block of ten consecutive `caption_id`s, of which a class has ten. The official test split holds one
    scene of each class; it is tested on, together with as many scenes drawn from the official train split as make up
    the share `test`. `validation` is the share of the scenes left. At a border between two parts, the picture next to
    it is dropped from the part that is trained on sooner (dropped: `border`), since it may show what its neighbour
    shows. One of the human captions of each picture is drawn from the seed.
    """

    def __init__(self, config: UcmData, seed: int) -> None:
        """Raises ConfigError if a label is unknown or given twice, or if there is none."""
        wrong = [n for n in config.labels if not 0 <= n < len(CLASSES)]
        if wrong or not config.labels or len(set(config.labels)) != len(config.labels):
            raise ConfigError(
                f"data.labels must be different numbers from 0 to {len(CLASSES) - 1}, at least one; "
                f"got {list(config.labels)}"
            )
        self.config = config
        self.seed = seed
        self.subject = "aerial views of " + " and ".join(CLASSES[n][0] for n in config.labels)
        self.normal_terms = tuple(term for n in config.labels for term in CLASSES[n][1])

    def normals(self) -> Normals:
        """See `DataModule.normals`. Reads the official train split only."""
        return self._normals

    @cached_property
    def _parts(self) -> dict[int, str]:
        """Part (`train`, `validation`, `test`, `border`) of each normal picture of the train file, by `caption_id`."""
        rows = read_rows(shards(self.config.path, "train"), ["label", "caption_id"], self._is_normal)
        parts: dict[int, str] = {}
        for label in self.config.labels:
            numbers = sorted(row["caption_id"] for row in rows if row["label"] == label)
            if not numbers:
                raise DataError(f"{self.config.path}: no train row has the label {label} of data.labels")
            parts |= self._class_parts(label, numbers)
        return parts

    @property
    def _is_normal(self) -> pc.Expression:
        return pc.field("label").isin(list(self.config.labels))

    def _class_parts(self, label: int, numbers: Sequence[int]) -> dict[int, str]:
        scenes = {_scene(n) for n in numbers}
        total = max(_CLASS_SIZE // SCENE, len(scenes))
        # The scenes that are missing here are those of the official test split: they count towards the share.
        tested = max(0, round(self.config.test * total) - (total - len(scenes)))
        test = draw_groups(scenes, tested, self.seed, f"test {label}")
        left = scenes - test
        validation = draw_groups(
            left, max(1, round(self.config.validation * len(left))), self.seed, f"validation {label}"
        )
        rank = {n: 2 if _scene(n) in test else 1 if _scene(n) in validation else 0 for n in numbers}
        names = ("train", "validation", "test")
        first, last = label * _CLASS_SIZE + 1, (label + 1) * _CLASS_SIZE
        parts = {}
        for n in numbers:
            # A number of the class that is not in the train file belongs to the official test split.
            beside = [rank.get(m, 2) for m in (n - 1, n + 1) if first <= m <= last]
            parts[n] = "border" if max(beside, default=0) > rank[n] else names[rank[n]]
        return parts

    @cached_property
    def _normals(self) -> Normals:
        parts = self._parts
        rows = read_rows(shards(self.config.path, "train"), _COLUMNS, self._is_normal)
        used = [row for row in rows if parts[row["caption_id"]] in ("train", "validation")]
        border = sum(part == "border" for part in parts.values())
        source = f"{self.config.path}, labels {list(self.config.labels)}"
        is_validation = [parts[row["caption_id"]] == "validation" for row in used]
        return split_by_group(self._image_set(used), is_validation, source, {"border": border})

    def look(self) -> None:
        """See `DataModule.look`."""
        for split in ("train", "test"):
            shards(self.config.path, split)

    def test(self) -> ImageSet:
        """The held-out normal scenes, then every row of the other classes in the official test split."""
        rows = read_rows(shards(self.config.path, "test"), _COLUMNS)
        normal = [row for row in rows if row["label"] in self.config.labels]
        anomalous = [row for row in rows if row["label"] not in self.config.labels]
        held_out = [n for n, part in self._parts.items() if part == "test"]
        train = read_rows(shards(self.config.path, "train"), _COLUMNS, pc.field("caption_id").isin(held_out))
        kept, seen = drop_seen(self._image_set(train + normal + anomalous), self.normals())
        self.test_dropped = {"duplicate": seen}
        return kept

    def _image_set(self, rows: Sequence[dict[str, Any]]) -> ImageSet:
        return ImageSet(
            tuple(row["source"] for row in rows),
            decode_rows(rows, self.config.path),
            tuple(self._caption(row) for row in rows),
            tuple(row["class_name"] for row in rows),
            np.array([row["label"] not in self.config.labels for row in rows], bool),
        )

    def _caption(self, row: dict[str, Any]) -> str:
        captions = row["captions"] or []
        if not captions:
            raise DataError(f"{self.config.path}: {row['source']} has no caption; fetch or convert the set again")
        return str(captions[stream(self.seed, f"caption {row['caption_id']}").integers(len(captions))])


def _scene(caption_id: int) -> int:
    return (caption_id - 1) // SCENE
