from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kka_ray.config.loading import parse
from kka_ray.config.models import Cifar100Data, FolderData
from kka_ray.config.renderer import RendererConfig
from kka_ray.data import open_data
from kka_ray.data.base import content_hash
from kka_ray.data.decode import encode_png
from kka_ray.errors import ConfigError
from kka_ray.render.sources import read_sources, state_of_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 chairs and 3 oaks of 8 px, as CIFAR-100 is stored. Of the two test pictures one is a copy of the first oak."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {
            "image": encode_png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)),
            "label": 0,
            "class_name": "chair" if n < 40 else "oak_tree",
            "superclass": "household_furniture" if n < 40 else "trees",
            "split": "train",
            "captions": ["an old oak."] if n == 42 else [],
            "source": f"train/{n}.png",
        }
        for n in range(43)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    new = {"image": encode_png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))}
    tests = [rows[40] | {"source": "test/0.png"}, rows[40] | {"source": "test/1.png"} | new]
    pq.write_table(pa.Table.from_pylist(tests), tmp_path / "test-00000-of-00001.parquet")
    return tmp_path


def config(folder: Path, **source: Any) -> RendererConfig:
    values = {
        "name": "trees",
        "data": str(folder.parent),
        "sources": [{"kind": "parquet", "path": folder.name, **source}],
        "captions": 3,
        "network": {"image_size": 16},
        "training": {"steps": 1},
    }
    return parse(values, RendererConfig, "test")


def test_every_photograph_comes_with_its_captions(folder: Path) -> None:
    images, captions, counts = read_sources(config(folder))
    assert counts == [{"images": 43}]
    assert images.shape == (43, 16, 16, 3)
    assert {len(texts) for texts in captions} == {3}
    assert all("chair" in text for texts in captions[:40] for text in texts)
    assert all("oak tree" in text for texts in captions[40:42] for text in texts)
    assert all(text.startswith("an old oak") for text in captions[42])
    assert len({text for texts in captions for text in texts}) > 10


def test_what_is_read_repeats(folder: Path) -> None:
    first, second = read_sources(config(folder)), read_sources(config(folder))
    assert np.array_equal(first[0], second[0])
    assert first[1] == second[1]


def test_superclasses_and_classes_are_left_out(folder: Path) -> None:
    assert len(read_sources(config(folder, without_superclasses=["household_furniture"]))[0]) == 3
    assert len(read_sources(config(folder, without_classes=["oak_tree"]))[0]) == 40
    with pytest.raises(ConfigError, match="fish"):
        read_sources(config(folder, without_superclasses=["fish"]))


def test_the_training_normals_of_a_folder_are_shown_with_their_captions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "cups" / "good").mkdir(parents=True)
    for n in range(20):
        file = tmp_path / "cups" / "good" / f"{n:02d}.png"
        file.write_bytes(encode_png(rng.integers(0, 256, (16, 12, 3), dtype=np.uint8)))
        if n % 2:
            file.with_suffix(".txt").write_text(f"cup number {n}, with a handle.\n")
    data = {"kind": "folder", "path": "cups", "description": "a blue cup"}
    values = config(tmp_path / "cups").model_dump() | {"sources": [{"kind": "data", "data": data, "seed": 3}]}
    images, captions, counts = read_sources(parse(values, RendererConfig, "test"))

    module = open_data(parse({**data, "path": str(tmp_path / "cups")}, FolderData, "test"), 3)
    normals = module.normals()
    assert images.shape == (len(normals.train), 16, 16, 3)
    assert counts == [{"images": len(normals.train), "validation": 4, **normals.dropped}]
    for id_, texts in zip(normals.train.ids, captions, strict=True):
        number = int(Path(id_).stem)
        assert len(texts) == 3
        assert all(
            f"cup number {number}, with a handle" in text if number % 2 else "blue cup" in text for text in texts
        )


def test_images_that_an_evaluation_holds_back_are_not_shown(folder: Path) -> None:
    data = {"kind": "cifar100", "path": folder.name, "validation": 10}
    trained = config(folder, held_out={"data": data, "seeds": 2})
    trained = trained.model_copy(update={"network": trained.network.model_copy(update={"image_size": 8})})
    images, _, (counts,) = read_sources(trained)
    shown = {content_hash(image) for image in images}
    for seed in (0, 1):
        module = open_data(parse({**data, "path": str(folder)}, Cifar100Data, "test"), seed)
        tested = module.test()
        assert tested is not None
        held_back = (*module.normals().validation.images, *tested.images)
        assert not shown & {content_hash(image) for image in held_back}
    assert 20 <= len(shown) - 2 < 30
    # The oak that is tested on as well is left out although its row is not.
    assert counts == {"images": len(shown), "held_out": 42 - len(shown), "copies": 1}


def test_drawn_flowers_and_photographs_can_be_shown_together(folder: Path) -> None:
    values = config(folder).model_dump()
    values["sources"] = [{"kind": "flowers", "count": 4}, *values["sources"]]
    images, captions, _ = read_sources(parse(values | {"processes": 1}, RendererConfig, "test"))
    assert len(images) == 47
    assert {len(texts) for texts in captions} == {3}
    assert all(len(set(texts)) == 1 for texts in captions[:4])


def test_a_source_that_changed_is_noticed(folder: Path) -> None:
    before = state_of_files(config(folder))
    assert state_of_files(config(folder)) == before
    (folder / "train-00001-of-00002.parquet").write_bytes(b"more")
    assert state_of_files(config(folder)) != before
    flowers = config(folder).model_dump() | {"sources": [{"kind": "flowers", "count": 4}]}
    state_of_files(parse(flowers, RendererConfig, "test"))  # nothing is read


def test_captions_outside_of_their_folder_that_changed_are_noticed(folder: Path) -> None:
    (folder.parent / "cups").mkdir()
    table = folder.parent / "captions.csv"
    table.write_text("file,caption\n")
    data = {"kind": "folder", "path": "cups", "description": "a cup", "captions": "../captions.csv"}
    values = config(folder).model_dump() | {"sources": [{"kind": "data", "data": data}]}
    cups = parse(values | {"data": str(folder.parent)}, RendererConfig, "test")
    before = state_of_files(cups)
    assert state_of_files(cups) == before
    table.write_text("file,caption\n1.png,a blue cup\n")
    assert state_of_files(cups) != before
