import numpy as np
import pytest

from kka_ray.config.models import FlowersData
from kka_ray.data import flowers, open_data
from kka_ray.data.base import content_hash
from kka_ray.errors import DataError

CONFIG = FlowersData(kind="flowers", normals=20, test_normals=6, test_anomalies=12)


@pytest.fixture
def without_drawing(monkeypatch):
    """Drawing takes nearly all of the time; tests of attributes do without."""
    monkeypatch.setattr(flowers, "draw", lambda flower, scene, rng, size=64: np.zeros((1, 1, 3), np.uint8))


def hashes(images):
    return {content_hash(image) for image in images.images}


def test_sizes_classes_and_disjointness():
    data = open_data(CONFIG, 0)
    normals, test = data.normals(), data.test()
    assert data.subject == "flowers"
    assert data.normal_terms == ()
    assert (len(normals.train), len(normals.validation), len(test)) == (16, 4, 18)
    assert normals.train.images[0].shape == (flowers.SIZE, flowers.SIZE, 3)
    assert set(normals.train.classes) == {"normal"}
    assert test.anomalous.tolist() == [False] * 6 + [True] * 12
    assert all((name == "normal") != anomalous for name, anomalous in zip(test.classes, test.anomalous, strict=True))
    assert not hashes(normals.train) & hashes(normals.validation)
    assert not (hashes(normals.train) | hashes(normals.validation)) & hashes(test)
    assert len(set(test.ids)) == len(test)


def test_repeats_by_seed():
    small = FlowersData(kind="flowers", normals=10, test_normals=2, test_anomalies=2)
    first, again, other = (open_data(small, seed) for seed in (0, 0, 1))
    assert first.normals().train.identity() == again.normals().train.identity()
    assert first.test().identity() == again.test().identity()
    assert first.normals().train.identity() != other.normals().train.identity()


def test_identical_drawings_are_too_few(without_drawing):
    with pytest.raises(DataError, match="1 distinct normal image.*Left out: 19 duplicate"):
        open_data(CONFIG, 0).normals()


def test_renderer_data_has_no_held_out_combination_and_every_attribute_value(without_drawing):
    seen = [d.flower for d in flowers.make_renderer_data(3000, 0)]
    assert not any(f.is_held_out for f in seen)
    for name, values in flowers.ATTRIBUTES.items():
        assert {getattr(f, name) for f in seen} == set(values)


def test_renderer_shards_differ(without_drawing):
    first, second = ([d.flower for d in flowers.make_renderer_data(50, 0, shard)] for shard in (0, 1))
    assert first != second


def test_anomalies_are_held_out_at_their_distance(without_drawing):
    made = [d.flower for d in flowers.make_test_anomalies(2000, 0)]
    assert all(f.is_held_out for f in made)
    for distance, share in flowers.TEST_DISTANCES.items():
        assert np.mean([f.distance == distance for f in made]) == pytest.approx(share, abs=0.04)


def test_normals_have_distance_zero(without_drawing):
    assert {d.flower.distance for d in flowers.make_normals(300, 0)} == {0}


def test_distance_counts_attributes_outside_the_normal_range():
    normal = {"petals": 5, "shape": "rounded", "colour": "white", "centre": "yellow", "pattern": "plain"}
    outside = {"petals": 12, "shape": "narrow", "colour": "red", "centre": "black", "pattern": "striped"}
    values = dict(normal)
    for distance, name in enumerate(outside, 1):
        values[name] = outside[name]
        assert flowers.Flower(**values).distance == distance
    assert flowers.Flower(**normal).distance == 0


def test_a_fifth_of_the_anomalous_combinations_is_held_out():
    everything = flowers.all_flowers()
    assert len(everything) == len(set(everything)) == 4900
    anomalous = [f for f in everything if f.distance]
    assert np.mean([f.is_held_out for f in anomalous]) == pytest.approx(0.2, abs=0.03)
    assert not any(f.is_held_out for f in everything if f.distance == 0)
