"""CIFAR-100: the images of one superclass are normal, every other class is a test anomaly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc

from kka_ray.config.models import Cifar100Data
from kka_ray.data.base import DataModule, ImageSet, Normals
from kka_ray.data.captions import fill
from kka_ray.data.parquet import decode_rows, read_rows, shards
from kka_ray.data.splits import drop_seen, split_normals
from kka_ray.errors import ConfigError

SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
"""The fine classes of each superclass, from the data set's authors."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "household_furniture": (
        *("furniture", "sofa", "settee", "loveseat", "armchair", "recliner", "rocking chair", "seat", "stool"),
        *("bench", "ottoman", "desk", "coffee table", "dining table", "nightstand", "bunk bed", "crib", "cot"),
        *("mattress", "armoire", "closet", "cupboard", "cabinet", "dresser"),
    ),
}
"""Further names of the normal objects, for the guard against descriptions of normal things."""

TEMPLATES = (
    "a photo of {}",
    "a small photo of {}",
    "a close-up of {}",
    "a picture of {}",
    "a photo of {} seen from the front",
    "a photo of {} in the middle of the picture",
)
ROOM_TEMPLATES = ("{} in a room", "a photo of {} in a room", "{} standing in a house", "a photo of {} against a wall")
"""Only true of furniture."""


class Cifar100Module(DataModule):
    """Normals: the train rows of the superclass. Test: all test rows, minus copies of the normals.

    `config.validation` of the distinct normals are drawn from the seed for validation, the others train. Captions are
    templates with the class name, since the set has none.
    """

    def __init__(self, config: Cifar100Data, seed: int) -> None:
        """Raises ConfigError if there is no such superclass."""
        if config.superclass not in SUPERCLASSES:
            raise ConfigError(
                f"data.superclass: CIFAR-100 has no {config.superclass!r}; it has {', '.join(SUPERCLASSES)}"
            )
        self.config = config
        self.seed = seed
        self.subject = _words(config.superclass)
        names = tuple(_words(n) for n in SUPERCLASSES[config.superclass])
        self.normal_terms = names + SYNONYMS.get(config.superclass, ())

    def normals(self) -> Normals:
        """See `DataModule.normals`. Raises DataError as well if a train file is missing or damaged."""
        return self._normals

    @cached_property
    def _normals(self) -> Normals:
        where = pc.field("superclass") == self.config.superclass
        rows = read_rows(shards(self.config.path, "train"), ["image", "class_name", "superclass", "source"], where)
        source = f"{self.config.path}, superclass {self.config.superclass}"
        return split_normals(self._image_set(rows), self.config.validation, self.seed, source)

    def look(self) -> None:
        """See `DataModule.look`."""
        for split in ("train", "test"):
            shards(self.config.path, split)

    def test(self) -> ImageSet:
        """Every test row that is no copy of a normal. Raises DataError if a test file is missing or damaged."""
        rows = read_rows(shards(self.config.path, "test"), ["image", "class_name", "superclass", "source"])
        kept, seen = drop_seen(self._image_set(rows), self.normals())
        self.test_dropped = {"duplicate": seen}
        return kept

    def _image_set(self, rows: Sequence[dict[str, Any]]) -> ImageSet:
        names = [_words(row["class_name"]) for row in rows]
        anywhere = fill(TEMPLATES, names, self.seed)
        in_rooms = fill(TEMPLATES + ROOM_TEMPLATES, names, self.seed)
        furniture = [row["superclass"] == "household_furniture" for row in rows]
        return ImageSet(
            tuple(row["source"] for row in rows),
            decode_rows(rows, self.config.path),
            tuple(room if f else plain for f, room, plain in zip(furniture, in_rooms, anywhere, strict=True)),
            tuple(row["class_name"] for row in rows),
            np.array([row["superclass"] != self.config.superclass for row in rows], bool),
        )


def _words(name: str) -> str:
    return name.replace("_", " ")
