"""Encoded images in, judgements out: what a detector replica does, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kka_ray.config.serve import ServeConfig
from kka_ray.data.decode import TooLargeError, decode, encode_png
from kka_ray.detectors.tuned import TunedDetector
from kka_ray.errors import DataError
from kka_ray.scoring import BATCH_PIXELS, judge, overlay


@dataclass(frozen=True)
class Item:
    """An encoded image, and whether its heat map is wanted."""

    name: str
    content: bytes
    heatmap: bool = False


@dataclass(frozen=True)
class Judgement:
    """What the detector says of an image; see `kka_ray.detectors.tuned.Scores`. `heatmap` is a PNG."""

    score: float
    robust_z: float
    percentile: float
    anomalous: bool
    threshold: float
    heatmap: bytes | None = None


@dataclass(frozen=True)
class Unreadable:
    """Why an image could not be decoded."""

    reason: str
    too_large: bool = False


class ImageScorer:
    """One detector with its backbone."""

    def __init__(self, tuned: TunedDetector, config: ServeConfig) -> None:
        self.tuned, self.config = tuned, config
        self.shows_heat = tuned.calibration.heat is not None
        """Whether there are heat maps: the detector localises, and was saved with their scale."""

    def score(self, items: Sequence[Item]) -> list[Judgement | Unreadable]:
        """A judgement for each image, in order; an image that cannot be decoded does not touch the others."""
        results: dict[int, Judgement | Unreadable] = {}
        rows: list[int] = []
        images: list[np.ndarray] = []
        for i, item in enumerate(items):
            try:
                images.append(decode(item.content, item.name, self.config.max_pixels))
            except DataError as error:
                results[i] = Unreadable(str(error), isinstance(error, TooLargeError))
                continue
            rows.append(i)
            if sum(image.shape[0] * image.shape[1] for image in images) >= BATCH_PIXELS:
                results |= self._judge(items, rows, images)
                rows, images = [], []
        if images:
            results |= self._judge(items, rows, images)
        return [results[i] for i in range(len(items))]

    def describe(self) -> dict[str, Any]:
        """What is served: detector, threshold, whether there are heat maps, backbone."""
        calibration, backbone = self.tuned.calibration, self.tuned.backbone
        return {
            "detector": self.tuned.config.kind,
            "threshold": calibration.threshold,
            "false_positive_rate": calibration.false_positive_rate,
            "heatmaps": self.shows_heat,
            "backbone": {
                "model": backbone.config.model,
                "identity": backbone.identity,
                "image_size": backbone.config.image_size,
            },
        }

    def _judge(self, items: Sequence[Item], rows: list[int], images: list[np.ndarray]) -> dict[int, Judgement]:
        scores, heat = judge(self.tuned, images, self.shows_heat and any(items[i].heatmap for i in rows))
        return {
            i: Judgement(
                float(scores.score[k]),
                float(scores.robust_z[k]),
                float(scores.percentile[k]),
                bool(scores.anomalous[k]),
                self.tuned.calibration.threshold,
                encode_png(overlay(images[k], heat[k])) if heat is not None and items[i].heatmap else None,
            )
            for k, i in enumerate(rows)
        }
