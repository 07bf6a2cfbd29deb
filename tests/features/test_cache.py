import numpy as np
import pytest

from kka_ray.features.base import Features
from kka_ray.features.cache import read_features, write_features
from kka_ray.store import Store


@pytest.mark.parametrize("patches", [True, False])
def test_features_come_back_as_they_were(tmp_path, patches: bool) -> None:
    rng = np.random.default_rng(0)
    features = Features(
        rng.random((3, 4), np.float32),
        rng.random((3, 2, 2, 5)).astype(np.float16),
        pixels=rng.integers(0, 256, (3, 32, 32, 3), np.uint8),
    )
    output = Store(str(tmp_path)).get_or_make("features", 1, {}, lambda a: write_features(a, features))
    read = read_features(output, patches=patches)
    assert np.array_equal(read.pooled, features.pooled)
    assert np.array_equal(read.pixels, features.pixels)
    assert (read.patches is not None) == patches
    if patches:
        assert np.array_equal(read.patches, features.patches)
