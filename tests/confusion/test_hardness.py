"""Hardness and the labels made of it."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from kka_ray.config.models import ConfusionConfig
from kka_ray.confusion.hardness import Band, Scale, paper_labels

NORMALS = np.exp(np.random.default_rng(0).normal(0, 0.5, 400))


def test_a_typical_normal_has_hardness_zero_and_the_unit_is_the_mad() -> None:
    hardness = Scale.of(NORMALS).hardness(NORMALS)
    assert abs(np.median(hardness)) < 1e-9
    assert abs(np.median(np.abs(hardness)) - 1) < 1e-9


def test_hardness_does_not_end_at_the_worst_normal_and_ignores_the_scores_scale() -> None:
    beyond = NORMALS.max() * np.array([2.0, 10.0, 100.0])
    hardness = Scale.of(NORMALS).hardness(beyond)
    assert (np.diff(hardness) > 1).all()
    assert np.allclose(Scale.of(NORMALS * 1000).hardness(beyond * 1000), hardness)


def test_scores_of_zero_and_equal_scores_stay_finite() -> None:
    assert np.isfinite(Scale.of(np.zeros(5)).hardness(np.array([0.0, 1.0]))).all()


def test_labels_follow_the_band_with_a_gap_between_hard_and_easy() -> None:
    config = ConfusionConfig(lower_quantile=0.9, upper=6, gap=2)
    validation = Scale.of(NORMALS).hardness(NORMALS)
    band = Band.of(validation, config)
    assert band.lower == np.quantile(validation, 0.9)
    values = [-1.0, band.lower, band.lower + 0.01, 6.0, 6.01, 8.0, 8.01, 1e6]
    assert [band.label(v) for v in values] == [
        "normal_like", "normal_like", "hard", "hard", "between", "between", "easy", "easy",
    ]  # fmt: skip
    hard = [v for v in np.linspace(-5, 20, 999) if band.label(v) == "hard"]
    easy = [v for v in np.linspace(-5, 20, 999) if band.label(v) == "easy"]
    assert min(easy) - max(hard) >= 2


def test_the_lower_edge_is_the_quantile_of_the_normals_or_the_configured_one_if_that_is_more() -> None:
    validation = Scale.of(NORMALS).hardness(NORMALS)
    quantile = float(np.quantile(validation, 0.95))
    edges = [Band.of(validation, ConfusionConfig(lower=lower, upper=9)).lower for lower in (0.0, quantile + 1)]
    assert edges == [quantile, quantile + 1]
    with pytest.raises(ValidationError, match="nothing would be hard"):
        ConfusionConfig(lower=5, upper=5)


def test_a_band_below_the_normals_edge_is_empty() -> None:
    band = Band(7.0, 6.0, 8.0)
    assert band.is_empty
    assert {band.label(v) for v in np.linspace(0, 20, 200)} == {"normal_like", "between", "easy"}


def test_paper_rule_and_its_overlap() -> None:
    hardness = np.array([-1.0, 2.0, 5.0, 9.0, 12.0])
    worst = np.full(5, 3.0)
    ids = list("abcde")
    assert paper_labels(hardness, worst, 2, ids) == ["hard", "hard", "between", "easy", "easy"]
    # With four easy ones b is both, so it is neither.
    assert paper_labels(hardness, worst, 4, ids) == ["hard", "between", "easy", "easy", "easy"]
    # The edge is the worst normal of the image's own fold.
    assert paper_labels(hardness, np.array([3, 1.5, 3, 3, 3]), 1, ids)[1] == "between"
