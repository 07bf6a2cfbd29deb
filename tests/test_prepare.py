"""What a run starts from, made or found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kka_ray.config.models import BackboneConfig, Cifar100Data, FlowersData, RunConfig
from kka_ray.data import open_data
from kka_ray.errors import DataError
from kka_ray.features.backbone import Backbone
from kka_ray.prepare import bare, extract_output, prepare
from kka_ray.prepare import test_set as read_test_set
from kka_ray.store import Store


def test_a_test_set_that_is_found_tells_as_much_as_one_that_is_drawn(tmp_path: Path) -> None:
    data = FlowersData(kind="flowers", normals=20, test_normals=4, test_anomalies=4)
    config, store = RunConfig(name="x", data=data), Store(str(tmp_path))
    drawn, found = open_data(data, 0), open_data(data, 0)
    first, second = read_test_set(config, drawn, store), read_test_set(config, found, store)
    assert first is not None
    assert second is not None
    assert first.identity() == second.identity()
    np.testing.assert_array_equal(first.anomalous, second.anomalous)
    assert dict(drawn.test_dropped) == dict(found.test_dropped) == {"duplicate": 0}


def test_what_follows_is_made_anew_at_another_image_size(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    values = {
        "name": "x",
        "data": {"kind": "flowers", "normals": 20},
        "detect": {"detectors": [{"kind": "knn"}], "headline": "knn"},
    }
    found = {
        size: prepare(RunConfig.model_validate(values | {"backbone": {"image_size": size}}), store).identity
        for size in (32, 64)
    }
    assert found[32] != found[64]
    assert prepare(RunConfig.model_validate(values | {"backbone": {"image_size": 32}}), store).identity == found[32]


def test_features_are_computed_once_for_pictures_whatever_they_are_called(tmp_path: Path) -> None:
    store, backbone = Store(str(tmp_path)), Backbone.load(BackboneConfig(image_size=32))
    first = bare([np.full((8, 8, 3), value, np.uint8) for value in (1, 2)])
    called = replace(first, ids=("a", "b"), captions=("a one", "a two"))
    others = bare([np.full((8, 8, 3), value, np.uint8) for value in (2, 1)])
    keys = [extract_output(store, backbone, images, False).key for images in (first, called, others)]
    assert keys[0] == keys[1] != keys[2]


def test_a_run_misses_its_test_files_before_it_reads_its_normals(tmp_path: Path) -> None:
    store, data = Store(str(tmp_path / "store")), tmp_path / "data"
    data.mkdir()
    config = RunConfig(name="x", data=Cifar100Data(kind="cifar100", path=str(data)))
    pq.write_table(pa.table({"image": [b"damaged"]}), data / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"has no test-\*\.parquet"):
        prepare(config, store)
    (data / "test-00000-of-00001.parquet").write_bytes(b"is not opened")
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet lacks columns"):
        prepare(config, store)
