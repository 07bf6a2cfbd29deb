import numpy as np
import pytest

from kka_ray.features.base import Features
from kka_ray.features.views import views


def picture(height: int = 40, width: int = 64) -> np.ndarray:
    image = np.full((height, width, 3), 100, np.uint8)
    image[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4] = 200
    return image


def test_views_come_image_after_image_and_keep_the_size() -> None:
    made = views([picture(), picture(32, 32)], 3, 0)
    assert [v.shape for v in made] == [(40, 64, 3)] * 3 + [(32, 32, 3)] * 3
    assert all(v.dtype == np.uint8 for v in made)
    assert len({v.tobytes() for v in made}) == 6, "every view is another"


def test_views_repeat_with_the_seed_and_differ_with_another() -> None:
    first, again, other = views([picture()], 2, 1), views([picture()], 2, 1), views([picture()], 2, 2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_a_view_moves_what_is_shown_a_little_and_keeps_its_shape() -> None:
    for view in views([picture()], 20, 3):
        bright = view.max(axis=2) > 1.4 * np.median(view)
        rows, columns = np.nonzero(bright)
        # A square of 8 px, zoomed by at most 15 % in each direction and shifted by at most a tenth of the sides.
        assert 8 * 8 * 0.6 < bright.sum() < 8 * 8 * 1.6
        assert abs(rows.mean() - 19.5) < 6
        assert abs(columns.mean() - 31.5) < 9
        assert np.ptp(rows) - np.ptp(columns) == pytest.approx(0, abs=2), "turned, not sheared"


def test_statistics_are_pooled_features_and_three_moments_of_each_channel() -> None:
    rng = np.random.default_rng(0)
    features = Features(rng.random((300, 4), np.float32), rng.random((300, 3, 3, 2)).astype(np.float16))
    got, grid = features.statistics(), features.patches.astype(np.float32)  # type: ignore[union-attr]
    want = [features.pooled, grid.mean((1, 2)), grid.std((1, 2)), grid.max((1, 2))]
    np.testing.assert_allclose(got, np.concatenate(want, axis=1), rtol=1e-6)
    assert got.dtype == np.float32
    assert np.array_equal(Features(features.pooled).statistics(), features.pooled)


def test_taking_and_joining_keep_rows_together() -> None:
    rng = np.random.default_rng(0)
    features = Features(
        rng.random((4, 3), np.float32),
        rng.random((4, 2, 2, 5)).astype(np.float16),
        pixels=rng.integers(0, 256, (4, 32, 32, 3), np.uint8),
        weights=np.arange(1, 5, dtype=np.float32),
    )
    taken = Features.join([features.take([3]), features.take([1, 0])])
    for name in ("pooled", "patches", "pixels", "weights"):
        assert np.array_equal(getattr(taken, name), getattr(features, name)[[3, 1, 0]]), name
    bare = Features.join([features, Features(features.pooled)])
    assert (len(bare), bare.patches, bare.pixels, bare.weights) == (8, None, None, None)


def test_weights_have_a_mean_of_one_and_are_those_of_the_views_too() -> None:
    images, views = Features(np.zeros((2, 3), np.float32)), Features(np.ones((4, 3), np.float32))
    weighted = Features(images.pooled, None, views, weights=np.array([1, 3], np.float32))
    assert weighted.relative_weights().tolist() == [0.5, 1.5]
    assert weighted.with_views().relative_weights().tolist() == [0.5, 1.5, 0.5, 0.5, 1.5, 1.5]
    assert images.relative_weights().tolist() == [1, 1]


def test_views_follow_their_images() -> None:
    own, other = Features(np.zeros((2, 3), np.float32)), Features(np.ones((4, 3), np.float32))
    assert Features(own.pooled, None, other).with_views().pooled.sum(axis=1).tolist() == [0, 0, 3, 3, 3, 3]
    assert own.with_views() is own
