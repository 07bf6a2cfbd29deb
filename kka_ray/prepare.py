"""What a run starts from: the normal images, their features, and what determines both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from kka_ray import versions
from kka_ray.config.models import BackboneConfig, FlowersData, RunConfig
from kka_ray.data import open_data
from kka_ray.data.base import DataModule, ImageSet, Normals
from kka_ray.data.decode import decode, encode_png
from kka_ray.features.backbone import Backbone
from kka_ray.features.base import Features
from kka_ray.features.cache import read_features, write_features
from kka_ray.features.pixels import SIDE
from kka_ray.store import Attempt, Output, Store

FEATURES_VERSION = 3
FLOWERS_VERSION = 4


@dataclass(frozen=True)
class Prepared:
    """Normal images and their features."""

    data: DataModule
    normals: Normals
    train: Features
    validation: Features
    backbone: Backbone
    patches: bool
    identity: str
    """Changes with the images, their split, the backbone and the features asked for."""

    @property
    def count(self) -> int:
        """Normal images, training and validation together; shares are of this number."""
        return len(self.normals.train) + len(self.normals.validation)


def prepare(config: RunConfig, store: Store) -> Prepared:
    """Reads the normal images and computes their features, or finds both in the store. Opens no test file.

    Raises DataError if normal images are too few or damaged, or if files are missing, of test images as well.
    """
    data = open_data(config.data, config.seed)
    data.look()  # it is the end of a run that would find test images missing
    normals = _normals(config, data, store)
    backbone = Backbone.load(config.backbone, "cpu")
    patches = needs_patches(config)
    train = extract(store, backbone, normals.train, patches)
    validation = extract(store, backbone, normals.validation, patches)
    of_features = feature_inputs(config.backbone, backbone.identity, patches)
    identity = json.dumps([normals.train.identity(), normals.validation.identity(), of_features])
    return Prepared(data, normals, train, validation, backbone, patches, identity)


def needs_patches(config: RunConfig) -> bool:
    """Whether any detector of the run reads patch features."""
    from kka_ray.detectors import build

    return any(build(d).needs_patches for d in config.detect.detectors)


def extract(store: Store, backbone: Backbone, images: ImageSet, patches: bool) -> Features:
    """Features of a set of images, computed once a content and backbone."""
    return read_features(extract_output(store, backbone, images, patches), patches=patches)


def extract_output(store: Store, backbone: Backbone, images: ImageSet, patches: bool) -> Output:
    """The output of stage `features` that `extract` reads."""
    inputs = feature_inputs(backbone.config, backbone.identity, patches) | {
        "images": images.pixels_identity(),
        "threads": torch.get_num_threads(),
    }
    return store.get_or_make(
        "features", FEATURES_VERSION, inputs, lambda a: write_features(a, backbone.extract(images.images, patches))
    )


def extract_images(store: Store, backbone: Backbone, images: Sequence[np.ndarray], patches: bool) -> Features:
    """Features of bare images."""
    return extract(store, backbone, bare(images), patches)


def bare(images: Sequence[np.ndarray]) -> ImageSet:
    """Images without captions or classes, their ids their numbers."""
    none = ("",) * len(images)
    ids = tuple(str(i) for i in range(len(images)))
    return ImageSet(ids, tuple(images), none, none, np.zeros(len(images), bool))


def feature_inputs(config: BackboneConfig, identity: str, patches: bool) -> dict[str, object]:
    """What features depend on besides the images."""
    return {
        "version": FEATURES_VERSION,  # with drawn images they are a part of another stage's output
        "backbone": identity,
        "image_size": config.image_size,
        "patches": patches,
        "pixels": SIDE,
        "versions": versions.computing(),
    }


def test_set(config: RunConfig, data: DataModule, store: Store) -> ImageSet | None:
    """The test images; only the final evaluation may ask for them."""
    if not isinstance(config.data, FlowersData):
        return data.test()

    def make(attempt: Attempt) -> None:
        drawn = data.test()
        assert drawn is not None
        attempt.table(_to_table(drawn))
        attempt.json(dict(data.test_dropped), "dropped")

    inputs = {"data": config.data.model_dump(mode="json"), "seed": config.seed, "part": "test"}
    output = store.get_or_make("flowers", FLOWERS_VERSION, inputs, make)
    data.test_dropped = output.json("dropped")
    return _from_table(output.table())


def _normals(config: RunConfig, data: DataModule, store: Store) -> Normals:
    """The normals; those of the demo domain are kept in the store, as drawing them takes longer than reading them."""
    if not isinstance(config.data, FlowersData):
        return data.normals()

    def make(attempt: Attempt) -> None:
        drawn = data.normals()
        attempt.table(_to_table(drawn.train), "train")
        attempt.table(_to_table(drawn.validation), "validation")
        attempt.json(drawn.dropped, "dropped")

    inputs = {"data": config.data.model_dump(mode="json"), "seed": config.seed, "part": "normals"}
    output = store.get_or_make("flowers", FLOWERS_VERSION, inputs, make)
    return Normals(_from_table(output.table("train")), _from_table(output.table("validation")), output.json("dropped"))


def _to_table(images: ImageSet) -> pa.Table:
    return pa.table(
        {
            "id": list(images.ids),
            "image": [encode_png(image) for image in images.images],
            "caption": list(images.captions),
            "class": list(images.classes),
            "anomalous": images.anomalous.tolist(),
        }
    )


def _from_table(table: pa.Table) -> ImageSet:
    rows = table.to_pydict()
    return ImageSet(
        tuple(rows["id"]),
        tuple(decode(content, id_) for content, id_ in zip(rows["image"], rows["id"], strict=True)),
        tuple(rows["caption"]),
        tuple(rows["class"]),
        np.array(rows["anomalous"], dtype=bool),
    )
