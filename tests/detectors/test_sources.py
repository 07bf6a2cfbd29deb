import numpy as np
import pytest

from kka_ray.detectors.sources import SOURCES, make
from kka_ray.errors import ConfigError, DataError


def _normals(count: int = 6, shape: tuple[int, ...] = (32, 32, 3)) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8))


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("shape", [(32, 32, 3), (37, 50, 3), (33, 20)])
def test_images_are_new_of_the_same_size_and_repeat(kind, shape):
    normals = _normals(shape=shape)
    before = [n.copy() for n in normals]
    made = make(kind, normals, 10, seed=3)
    assert len(made) == 10
    assert all(m.shape == shape and m.dtype == np.uint8 for m in made)
    assert all(np.array_equal(a, b) for a, b in zip(normals, before, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(made, make(kind, normals, 10, seed=3), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(made, make(kind, normals, 10, seed=4), strict=True))
    assert not any(np.array_equal(m, n) for m in made for n in normals)


@pytest.mark.parametrize("kind", SOURCES)
def test_normals_are_not_repeated_while_there_are_enough(kind):
    # Each normal has a brightness of its own, which every source leaves nearly as it is.
    normals = [np.full((32, 32, 3), 30 + 20 * i, np.uint8) for i in range(10)]
    levels = {round((float(np.median(m)) - 30) / 20) for m in make(kind, normals, 10, seed=0)}
    assert levels == set(range(10))


def test_noise_has_a_deviation_of_40():
    (image,) = make("noise", [np.full((200, 200, 3), 128, np.uint8)], 1, seed=0)
    assert abs(float(image.std()) - 40) < 1


def test_cutpaste_changes_one_rectangle_with_pixels_of_another():
    black, white = np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 255, np.uint8)
    for image in make("cutpaste", [black, white], 20, seed=0):
        odd = image[..., 0] != np.median(image)
        rows, columns = np.flatnonzero(odd.any(1)), np.flatnonzero(odd.any(0))
        assert odd.sum() == len(rows) * len(columns)
        assert np.ptp(rows) + 1 == len(rows)
        assert np.ptp(columns) + 1 == len(columns)
        assert 0.01 < odd.mean() < 0.2


def test_shuffling_keeps_the_pixels():
    (normal,) = _normals(1)
    (image,) = make("patch_shuffle", [normal], 1, seed=0)
    assert np.array_equal(np.sort(image, axis=None), np.sort(normal, axis=None))


def test_blurring_smooths():
    (normal,) = _normals(1)
    (image,) = make("blur", [normal], 1, seed=0)
    assert np.abs(np.diff(image.astype(int), axis=0)).mean() < 0.2 * np.abs(np.diff(normal.astype(int), axis=0)).mean()


def test_bad_requests_are_refused():
    with pytest.raises(ConfigError, match="noise, cutpaste, blur, patch_shuffle"):
        make("sepia", _normals(), 1, 0)
    with pytest.raises(DataError, match="none"):
        make("noise", [], 1, 0)
    with pytest.raises(DataError, match="too small"):
        make("patch_shuffle", _normals(1, (3, 3, 3)), 1, 0)
    assert make("noise", _normals(), 0, 0) == []
