"""What a round drew, put together for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kka_ray.cluster.streaming import Drawn
from kka_ray.data.decode import encode_png
from kka_ray.features.base import Features
from kka_ray.records import Rendering


def drawn_of(ids: Sequence[str], images: Sequence[np.ndarray], features: Features) -> Drawn:
    """Images, all drawn without error, with their features."""
    rows = [Rendering(id_, 0, 0, "ok", encode_png(image), "") for id_, image in zip(ids, images, strict=True)]
    return Drawn(renderings=rows, ids=list(ids), features=features)
