from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kka_ray.errors import AssetError
from kka_ray.render.domain import (
    FILE,
    LEAST,
    THRESHOLD,
    Reference,
    domain_distance,
    domain_warning,
    load_reference,
    save_reference,
)


def features(count: int, centre: int, seed: int) -> np.ndarray:
    """Unit vectors (count, 64) around the axis `centre`."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(0, 0.1, (count, 64))
    vectors[:, centre] += 1
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_distance_is_small_within_the_domain_and_large_outside() -> None:
    reference = features(256, 0, 0)
    assert abs(domain_distance(features(100, 0, 1), reference)) < 2
    assert domain_distance(features(100, 5, 2), reference) > THRESHOLD


def test_distance_bears_with_a_few_strangers() -> None:
    mixed = np.concatenate([features(80, 0, 1), features(20, 5, 2)])
    assert domain_distance(mixed, features(256, 0, 0)) < THRESHOLD


def test_warning_says_what_to_do_outside_the_domain_only() -> None:
    reference = Reference(features(256, 0, 0), "lite0", 96)
    assert domain_warning(features(50, 0, 1), reference, "hub:x/y", "flowers") is None
    said = domain_warning(features(50, 5, 1), reference, "hub:x/y", "steel screws")
    assert said is not None
    for part in ("steel screws", "hub:", "img2img", "train a renderer"):
        assert part in said


def test_features_of_another_backbone_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different backbones"):
        domain_distance(features(50, 5, 1)[:, :32], features(50, 5, 1))


def test_reference_is_small_and_read_back(tmp_path: Path) -> None:
    assert load_reference(tmp_path) is None
    with pytest.raises(ValueError, match=f"at least {LEAST}"):
        save_reference(tmp_path, features(LEAST - 1, 0, 0), "lite0", 64)
    save_reference(tmp_path, features(400, 0, 0), "lite0", 64)
    loaded = load_reference(tmp_path)
    assert loaded is not None
    assert loaded.pooled.shape == (256, 64)
    assert (loaded.backbone, loaded.image_size) == ("lite0", 64)
    assert (tmp_path / FILE).stat().st_size < 256 * 64 * 2 + 1000
    (tmp_path / FILE).write_bytes(b"broken")
    with pytest.raises(AssetError, match="damaged"):
        load_reference(tmp_path)
