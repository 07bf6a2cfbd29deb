"""From scores to hardness, and from hardness to labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kka_ray.config.models import ConfusionConfig
from kka_ray.features.robust import Robust

Label = Literal["normal_like", "hard", "between", "easy"]

_LEAST_SCORE = 1e-12


@dataclass(frozen=True)
class Scale:
    """How the scores of one evaluator are read: median and MAD of the log scores of its validation normals."""

    logs: Robust

    @classmethod
    def of(cls, validation_scores: np.ndarray) -> Scale:
        """The scale of validation scores (M,), M >= 1; equal scores give a MAD that is small but not 0."""
        return cls(Robust.of(_log(validation_scores)))

    def hardness(self, scores: np.ndarray) -> np.ndarray:
        """(log score - median) / MAD, float64 (N,): about 0 for a typical normal, larger the further away.

        Unlike a percentile among the normals it does not end at the worst normal, beyond which anomalies lie.
        """
        return self.logs(_log(scores))


@dataclass(frozen=True)
class Band:
    """Edges in units of hardness. lower: normal-like up to here; hard up to `upper`; easy beyond `easy`.

    Where `lower` >= `upper` no image is hard: the normals themselves spread beyond the band.
    """

    lower: float
    upper: float
    easy: float

    @classmethod
    def of(cls, validation_hardness: np.ndarray, config: ConfusionConfig) -> Band:
        """The band whose lower edge is the configured quantile of validation normals' hardness, or `config.lower`."""
        lower = max(float(np.quantile(validation_hardness, config.lower_quantile)), config.lower)
        return cls(lower, config.upper, config.upper + config.gap)

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be hard."""
        return self.lower >= self.upper

    def label(self, hardness: float) -> Label:
        """The label of one image. Edges belong to the nearer side: at `lower` normal-like, at `upper` hard."""
        if hardness <= self.lower:
            return "normal_like"
        if hardness <= self.upper:
            return "hard"
        return "between" if hardness <= self.easy else "easy"


def paper_labels(hardness: np.ndarray, worst_normal: np.ndarray, count: int, ids: Sequence[str]) -> list[Label]:
    """The rule of the paper's code: hard up to the worst normal, easy the `count` largest.

    `hardness` and `worst_normal` are (N,), the latter the largest hardness of the validation normals of the image's
    fold: within a fold hardness and score are in the same order, and between folds only hardness compares. The rule
    has no lower edge, so nothing is normal-like. An image that would be both, where there are few images, is neither
    (`between`). Ties go by id.
    """
    order = sorted(range(len(ids)), key=lambda i: (-hardness[i], ids[i]))
    easy = set(order[:count])
    labels: list[Label] = []
    for i in range(len(ids)):
        hard = hardness[i] <= worst_normal[i]
        labels.append("between" if hard == (i in easy) else "hard" if hard else "easy")
    return labels


def _log(scores: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(scores, np.float64), _LEAST_SCORE))
