"""What the demo domain alone can tell: whether drawn pictures are in truth what the evaluator takes them for.

A classifier that the loop never uses reads the attributes off the drawn pictures, so that hardness is held against
the picture and not against its caption.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import spearmanr

from kka_ray.data.flower_reader import FlowerReader
from kka_ray.loop import LoopResult


def measure(result: LoopResult) -> dict[str, Any]:
    """True attributes of the drawn pictures against the auditor's verdicts and the kept set.

    `spearman`: rank correlation of hardness with the number of attributes outside the normal range, over all drawn
    pictures but those whose evaluator collapsed. `kept_normal_share`: share of the kept pictures that are in truth
    normal. `distance_by_round`: mean distance of the pictures drawn in each round.
    """
    reader = FlowerReader.load()
    ids = [id_ for r in result.rounds for id_ in r.drawn.ids]
    if not ids or result.audit is None:
        return {}
    flowers = reader.read(np.stack(result.images(ids))).flowers
    distance = {id_: flower.distance for id_, flower in zip(ids, flowers, strict=True)}
    hardness = {v.id: v.hardness for v in result.audit.sound}
    kept = [distance[k.id] for k in result.rounds[-1].kept]
    by_label: dict[str, list[int]] = {}
    for verdict in result.audit.verdicts:
        by_label.setdefault(verdict.label, []).append(distance[verdict.id])
    return {
        "spearman": _finite(spearmanr(list(hardness.values()), [distance[i] for i in hardness]).statistic),
        "kept_normal_share": sum(d == 0 for d in kept) / len(kept) if kept else 0.0,
        "kept_mean_distance": float(np.mean(kept)) if kept else 0.0,
        "distance_by_round": [
            float(np.mean([distance[i] for i in r.drawn.ids])) if r.drawn.ids else None for r in result.rounds
        ],
        "distance_by_label": {label: float(np.mean(v)) for label, v in sorted(by_label.items())},
        "normal_share_by_label": {label: sum(d == 0 for d in v) / len(v) for label, v in sorted(by_label.items())},
    }


def _finite(value: float) -> float | None:
    """None where a correlation is not defined, as with constant values."""
    return float(value) if np.isfinite(value) else None
