"""A detector of flowers, saved as a run saves it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kka_ray import assets


@pytest.fixture(scope="session")
def flowers() -> list[np.ndarray]:
    from kka_ray.data import flowers

    return [d.image for d in flowers.make_normals(30, 0)]


@pytest.fixture(scope="session")
def run(flowers: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kka_ray.config.models import BackboneConfig, Knn
    from kka_ray.detectors.tuned import TunedDetector
    from kka_ray.features.backbone import Backbone

    reference = "builtin:efficientnet-lite0"
    if not assets.is_present(reference):
        pytest.skip(f"{reference} is not in the cache: run `kka setup`")
    backbone = Backbone.load(BackboneConfig(image_size=64))
    train, validation = (backbone.extract(part, patches=False) for part in (flowers[:20], flowers[20:]))
    tuned = TunedDetector.fit(Knn(kind="knn"), backbone, train, None, validation, seed=0, false_positive_rate=0.1)
    folder = tmp_path_factory.mktemp("run")
    tuned.save(folder / "detector")
    return folder
