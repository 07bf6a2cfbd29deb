from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from kka_ray import text_signal
from kka_ray.loop import LoopResult
from kka_ray.records import Verdict

RNG = np.random.default_rng(0)
TEXTS = RNG.normal(size=(400, 8))


def test_hardness_that_follows_the_text_is_told_and_chance_is_not() -> None:
    noise = RNG.normal(size=400)
    follows = TEXTS[:, 0] + 0.3 * noise
    found = text_signal.told(TEXTS, follows, follows > 0.5, follows <= 0.5)
    assert found["lines"] == 400
    assert found["spearman"] > 0.9
    assert found["hard_auc"] > 0.95
    chance = text_signal.told(TEXTS, noise, noise > 0.5, noise <= 0.5)
    assert abs(chance["spearman"]) < 0.2
    assert chance["hard_auc"] == pytest.approx(0.5, abs=0.1)
    assert text_signal.told(TEXTS, follows, follows > 0.5, follows <= 0.5) == found


def test_chance_is_told_as_none_on_average() -> None:
    rng, no = np.random.default_rng(1), np.zeros(50, bool)
    found = [text_signal.told(TEXTS[:50], rng.normal(size=50), no, no)["spearman"] for _ in range(40)]
    assert abs(np.mean(found)) < 0.1, "predictions over all folds give -0.3"


def test_a_band_amid_what_is_told_is_not_told_itself_but_against_one_side_it_is() -> None:
    hardness = TEXTS[:, 0] + RNG.normal(size=400)
    band = np.abs(hardness) < 0.8
    found = text_signal.told(TEXTS, hardness, band, ~band)
    assert found["spearman"] > 0.6
    assert found["hard_auc"] < 0.6
    assert text_signal.told(TEXTS, hardness, band, hardness > 1.2)["hard_auc"] > 0.75


def test_too_few_lines_or_one_value_tell_nothing() -> None:
    few, zeros, no = TEXTS[:49], np.zeros(400), np.zeros(400, bool)
    nothing = {"spearman": None, "hard_auc": None}
    assert text_signal.told(few, few[:, 0], few[:, 0] > 0, few[:, 0] <= 0) == {"lines": 49, **nothing}
    assert text_signal.told(TEXTS, zeros, no, ~no) == {"lines": 400, **nothing}
    some = np.arange(400) < 49
    assert text_signal.told(TEXTS, TEXTS[:, 0], some, ~some)["hard_auc"] is None


def test_a_run_is_measured_by_the_auditors_verdicts_on_images_that_show_their_texts() -> None:
    hardness = TEXTS[:, 0]
    labels = np.where(hardness > 0.5, "hard", np.where(hardness > -0.5, "normal_like", "easy"))
    order = reversed(range(len(TEXTS)))
    verdicts = [Verdict(f"r0-{i}", 0, 0, hardness[i], hardness[i], labels[i]) for i in order]
    lines = [SimpleNamespace(id=f"r0-{i}", text=str(i)) for i in range(len(TEXTS))]
    encoder = cast(Any, SimpleNamespace(embed=lambda texts: TEXTS[[int(t) for t in texts]]))
    round_ = SimpleNamespace(descriptions=lines, drawn=SimpleNamespace(mismatched=["r0-7"]))
    # Image 5's evaluator collapsed: it is in no sound verdict.
    audit = SimpleNamespace(verdicts=verdicts, sound=[v for v in verdicts if v.id != "r0-5"])
    result = cast(LoopResult, SimpleNamespace(rounds=[round_], audit=audit))
    found = text_signal.measure(result, encoder, ("easy", "guarded"))
    assert found["lines"] == 398
    assert found["spearman"] > 0.95
    assert found["hard_auc"] > text_signal.measure(result, encoder, ("normal_like",))["hard_auc"]
    nothing = cast(LoopResult, SimpleNamespace(rounds=[], audit=None))
    assert text_signal.measure(nothing, encoder, ("easy",))["lines"] == 0
