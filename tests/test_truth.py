"""What drawn flowers show in truth, against the verdicts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from kka_ray import truth
from kka_ray.confusion.judge import JudgeResult, LatentMap
from kka_ray.loop import LoopResult
from kka_ray.records import Verdict

NONE = np.zeros((0, 2), np.float32)


def measured(monkeypatch: pytest.MonkeyPatch, collapsed: bool) -> dict[str, Any]:
    """Of 30 pictures, the hardness of which is their distance; the second of three folds may have collapsed."""
    flowers = [SimpleNamespace(distance=i // 5) for i in range(30)]
    reader = SimpleNamespace(read=lambda images: SimpleNamespace(flowers=flowers))
    monkeypatch.setattr(truth.FlowerReader, "load", lambda: reader)
    ids = [f"r0-{i}" for i in range(30)]
    verdicts = [
        Verdict(id_, 0, i % 3, 0.0, 0.0, "between")
        if collapsed and i % 3 == 1
        else Verdict(id_, 0, i % 3, float(i), float(i), "hard" if i < 15 else "easy")
        for i, id_ in enumerate(ids)
    ]
    told = {"fold_1/collapsed": float(collapsed)}
    audit = JudgeResult(list(reversed(verdicts)), told, None, LatentMap(NONE, NONE, NONE, NONE))
    round_ = SimpleNamespace(drawn=SimpleNamespace(ids=ids), kept=[SimpleNamespace(id=i) for i in ids[3:7]])
    result = SimpleNamespace(
        rounds=[round_], audit=audit, images=lambda ids: [np.zeros((2, 2, 3), np.uint8)] * len(ids)
    )
    return truth.measure(cast(LoopResult, result))


@pytest.mark.parametrize("collapsed", [False, True])
def test_hardness_is_held_against_the_attributes_where_it_was_judged(
    monkeypatch: pytest.MonkeyPatch, collapsed: bool
) -> None:
    found = measured(monkeypatch, collapsed)
    assert found["spearman"] > 0.97
    assert found["kept_normal_share"] == 0.5
    assert found["kept_mean_distance"] == 0.5
    assert found["distance_by_round"] == [2.5]
    assert found["normal_share_by_label"]["hard"] == pytest.approx(1 / 3, abs=0.1)
