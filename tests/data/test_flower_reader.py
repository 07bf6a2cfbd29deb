from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kka_ray.data import flower_reader, flowers
from kka_ray.data.flower_reader import FlowerReader, accuracy, augment, training_images
from kka_ray.data.flowers import ATTRIBUTES, Flower
from kka_ray.errors import AssetError, DataError


@pytest.fixture(scope="module")
def drawn() -> list[flowers.DrawnFlower]:
    return flowers.make_renderer_data(300, seed=77)


@pytest.mark.parametrize("held_out", [False, True], ids=["new pictures", "held-out combinations"])
def test_shipped_reader_reads_every_attribute(drawn: list[flowers.DrawnFlower], held_out: bool) -> None:
    shown = flowers.make_test_anomalies(300, 77) if held_out else drawn
    right = accuracy(FlowerReader.load(), np.stack([d.image for d in shown]), [d.flower for d in shown])
    shares = {name: share for name, share in right.items() if name != "all"}
    assert np.mean(list(shares.values())) >= 0.95
    # The card says 0.95 and better for each on 2,000 pictures; 300 leave some room for chance.
    assert {name: share for name, share in shares.items() if share < 0.93} == {}


def test_reading_holds_flowers_and_probabilities_of_each_picture(drawn: list[flowers.DrawnFlower]) -> None:
    reader = FlowerReader.load()
    images = np.stack([d.image for d in drawn[:5]])
    reading = reader.read(images)
    for name, values in ATTRIBUTES.items():
        shares = reading.probabilities[name]
        assert shares.shape == (5, len(values))
        np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
        assert [getattr(f, name) for f in reading.flowers] == [values[i] for i in shares.argmax(1)]
    one_by_one = [reader.read(image[None]).flowers[0] for image in images]
    assert one_by_one == reading.flowers
    assert reader.read(images[:0]).flowers == []


def test_other_shapes_and_types_are_refused() -> None:
    reader = FlowerReader.load()
    with pytest.raises(DataError, match="resize"):
        reader.read(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(DataError, match="float"):
        reader.read(np.zeros((1, 64, 64, 3)))


def test_missing_weights_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="flower_reader train"):
        FlowerReader.load(tmp_path)


def test_augmentation_changes_pictures_but_not_their_content(drawn: list[flowers.DrawnFlower]) -> None:
    images = torch.from_numpy(np.stack([d.image for d in drawn[:16]])).permute(0, 3, 1, 2).float() / 127.5 - 1
    changed = augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert float(changed.abs().max()) <= 1
    assert float((changed - images).abs().mean()) > 0.01
    assert float((changed.mean((2, 3)) - images.mean((2, 3))).abs().max()) < 0.35
    torch.testing.assert_close(changed, augment(images, torch.Generator().manual_seed(0)), rtol=0, atol=0)


def test_block_artefacts_vanish_with_the_step() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    step = torch.tensor([1e-4, 1.0]).view(2, 1, 1, 1, 1, 1)
    changed = flower_reader._quantise_blocks(images, step)
    torch.testing.assert_close(changed[0], images[0], atol=1e-3, rtol=0)
    assert float((changed[1] - images[1]).abs().mean()) > 0.1


def test_training_pictures_hold_no_held_out_combination(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flower_reader, "_SHARD", 60)
    labels = flower_reader._draw_shard(5, 0)[1]
    names = list(ATTRIBUTES)
    seen = [Flower(**{n: ATTRIBUTES[n][i] for n, i in zip(names, row, strict=True)}) for row in labels.tolist()]
    assert not any(f.is_held_out for f in seen)
    # What the cache holds is what is read back.
    source = flower_reader.hashlib.sha256(Path(flowers.__file__).read_bytes()).hexdigest()[:8]
    np.savez(tmp_path / f"flowers-5-1-{source}.npz", images=np.zeros((60, 64, 64, 3), np.uint8), labels=labels)
    np.testing.assert_array_equal(training_images(60, 5, 1, tmp_path)[1], labels)


@pytest.mark.slow
def test_a_reader_learns(drawn: list[flowers.DrawnFlower], tmp_path: Path) -> None:
    images = np.stack([d.image for d in drawn])
    labels = np.array([[v.index(getattr(d.flower, n)) for n, v in ATTRIBUTES.items()] for d in drawn])
    reader = flower_reader.fit(images, labels, epochs=12, batch=50)
    flower_reader.save(reader, tmp_path)
    right = accuracy(FlowerReader.load(tmp_path), images, [d.flower for d in drawn])
    assert right["colour"] > 0.6  # by chance 0.22: half of the pictures lie near the normal range
