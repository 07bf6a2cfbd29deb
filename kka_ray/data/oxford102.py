"""Oxford-102 flowers: one species is normal and, being small, is tested by folds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc

from kka_ray.config.models import Oxford102Data
from kka_ray.data.base import DataModule, ImageSet, Normals
from kka_ray.data.captions import fill
from kka_ray.data.parquet import decode_rows, read_rows, shards
from kka_ray.data.splits import drop_duplicates, drop_seen, fold_rows, split_normals
from kka_ray.errors import ConfigError, DataError

SYNONYMS: dict[int, tuple[str, ...]] = {
    25: ("poppy", "red poppy", "field poppy", "common poppy", "Flanders poppy"),
}
"""Further names of a species, by label, for the guard against descriptions of normal things."""

TEMPLATES = (
    "a photo of {}",
    "a close-up of {}",
    "a photo of {} in bloom",
    "a photo of {} in a garden",
    "a close-up photo of the petals of {}",
    "{} seen from above",
)

_COLUMNS = ["image", "label", "class_name", "source"]


class Oxford102Module(DataModule):
    """Normals: all images of one species but fold `fold`. Test: that fold, and the other species of the test split.

    The official train part holds 20 images of a species, so the species' images of both official splits are pooled,
    cleared of duplicates and cut into `folds` folds by the seed; reading them filters the test file by label and sees
    no anomaly. The images outside the fold are split into training and validation by rows. Test anomalies are the rows
    of the other species in the official *test* split only; those of its train split are not used at all. Captions are
    templates with the species' name.
    """

    def __init__(self, config: Oxford102Data, seed: int) -> None:
        """Raises ConfigError if there is no such fold, DataError if the train file lacks the species."""
        if config.fold >= config.folds:
            raise ConfigError(f"data.fold: there is no fold {config.fold} of {config.folds}; they count from 0")
        self.config = config
        self.seed = seed
        rows = read_rows(shards(config.path, "train"), ["label", "class_name"], pc.field("label") == config.label)
        if not rows:
            raise DataError(f"{config.path}: no train row has the label {config.label}; labels count from 0")
        name = rows[0]["class_name"]
        self.subject = f"{name} flowers"
        self.normal_terms = (name, *SYNONYMS.get(config.label, ()))

    def look(self) -> None:
        """See `DataModule.look`; the train file was read before."""
        shards(self.config.path, "test")

    def normals(self) -> Normals:
        """See `DataModule.normals`. Raises DataError as well if the fold is empty, and a test would lack normals."""
        return self._normals

    @cached_property
    def _species(self) -> tuple[ImageSet, int]:
        where = pc.field("label") == self.config.label
        files = shards(self.config.path, "train") + shards(self.config.path, "test")
        return drop_duplicates(self._image_set(read_rows(files, _COLUMNS, where)))

    @cached_property
    def _fold(self) -> np.ndarray:
        return fold_rows(len(self._species[0]), self.config.folds, self.config.fold, self.seed)

    @cached_property
    def _normals(self) -> Normals:
        species, duplicates = self._species
        if not len(self._fold):
            raise DataError(
                f"{self.config.path}: the label {self.config.label} has {len(species)} distinct images, of which fold "
                f"{self.config.fold} of {self.config.folds} has none; set data.folds to {len(species)} at most"
            )
        rest = species.take(np.setdiff1d(np.arange(len(species)), self._fold))
        source = f"{self.config.path}, label {self.config.label}, outside fold {self.config.fold}"
        return split_normals(rest, self.config.validation, self.seed, source, {"duplicate": duplicates})

    def test(self) -> ImageSet:
        """The normal images of the fold, then the other species of the official test split."""
        where = pc.field("label") != self.config.label
        anomalies = self._image_set(read_rows(shards(self.config.path, "test"), _COLUMNS, where))
        normal = self._species[0].take(self._fold)
        both = ImageSet(
            normal.ids + anomalies.ids,
            normal.images + anomalies.images,
            normal.captions + anomalies.captions,
            normal.classes + anomalies.classes,
            np.concatenate([normal.anomalous, anomalies.anomalous]),
        )
        kept, seen = drop_seen(both, self.normals())
        self.test_dropped = {"duplicate": seen}
        return kept

    def _image_set(self, rows: Sequence[dict[str, Any]]) -> ImageSet:
        names = tuple(row["class_name"] for row in rows)
        return ImageSet(
            tuple(row["source"] for row in rows),
            decode_rows(rows, self.config.path),
            fill(TEMPLATES, names, self.seed),
            names,
            np.array([row["label"] != self.config.label for row in rows], bool),
        )
