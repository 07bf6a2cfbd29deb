from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from kka_ray.render.masks import blob_mask


def test_area_lies_in_the_range_and_the_seed_decides() -> None:
    masks = [blob_mask(48, 64, seed, 0.05, 0.3) for seed in range(40)]
    areas = np.array([m.mean() for m in masks])
    assert areas.min() >= 0.05 - 1e-3
    assert areas.max() <= 0.3 + 1e-3
    assert areas.std() > 0.03
    np.testing.assert_array_equal(masks[3], blob_mask(48, 64, 3, 0.05, 0.3))
    assert len({m.tobytes() for m in masks}) == len(masks)


def test_blobs_are_connected_and_lie_everywhere() -> None:
    masks = [blob_mask(64, 64, seed, 0.05, 0.3) for seed in range(60)]
    sizes = []
    for mask in masks:
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        sizes.append(np.bincount(labels.ravel())[1:].max() / mask.sum())
        assert count >= 1
    # Sampling a thin tip on the grid may cut off a pixel or two.
    assert min(sizes) > 0.97
    assert np.mean(masks, axis=0).min() > 0


@pytest.mark.parametrize("area", [1e-9, 1.0])
def test_extreme_areas(area: float) -> None:
    mask = blob_mask(8, 8, 0, area, area)
    assert mask.sum() == (64 if area == 1.0 else 1)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (0.3, 0.2), (0.5, 1.5)])
def test_an_impossible_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="min_area"):
        blob_mask(8, 8, 0, low, high)
