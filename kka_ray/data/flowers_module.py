"""The demo domain as a data set: flowers drawn on the spot."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from kka_ray.config.models import FlowersData
from kka_ray.data import flowers
from kka_ray.data.base import DataModule, ImageSet, Normals
from kka_ray.data.splits import drop_seen, split_normals, stream


class FlowersModule(DataModule):
    """Normal flowers for training and validation; other normal flowers and held-out anomalies for testing.

    The class of an image is `normal` or `distance-N`, N the number of attributes outside the normal range.
    """

    subject = "flowers"
    normal_terms = ()

    def __init__(self, config: FlowersData, seed: int) -> None:
        self.config = config
        self.seed = seed

    def normals(self) -> Normals:
        """See `DataModule.normals`."""
        return self._normals

    @cached_property
    def _normals(self) -> Normals:
        drawn = flowers.make_normals(self.config.normals, self.seed)
        return split_normals(_image_set(drawn, "normal"), self.config.validation, self.seed, "flowers")

    def test(self) -> ImageSet:
        """`test_normals` normal flowers from a stream of their own, then `test_anomalies` held-out anomalies."""
        rng = stream(self.seed, "test normals")
        normal = [flowers.make(flowers.sample_normal(rng), rng) for _ in range(self.config.test_normals)]
        anomalous = flowers.make_test_anomalies(self.config.test_anomalies, self.seed)
        kept, seen = drop_seen(_image_set(normal + anomalous, "test"), self.normals())
        self.test_dropped = {"duplicate": seen}
        return kept


def _image_set(drawn: list[flowers.DrawnFlower], prefix: str) -> ImageSet:
    distances = [d.flower.distance for d in drawn]
    return ImageSet(
        tuple(f"{prefix}-{i:05d}" for i in range(len(drawn))),
        tuple(d.image for d in drawn),
        tuple(d.caption for d in drawn),
        tuple(f"distance-{n}" if n else "normal" for n in distances),
        np.array([n > 0 for n in distances], bool),
    )
