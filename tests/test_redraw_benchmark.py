from pathlib import Path

import numpy as np
import pytest

from tests.scripts import load_script

FILE = Path(__file__).parents[1] / "benchmarks" / "redraw.py"


@pytest.fixture(scope="module")
def bench():
    return load_script(FILE)


def test_texts_that_decide_everything_leave_nothing_to_chance(bench):
    hardness = np.tile(np.arange(1.0, 11.0), (3, 1))
    labels = np.where(hardness < 3, "normal_like", np.where(hardness < 7, "hard", "easy"))
    found = bench.figures(hardness, labels)
    assert found["rank_correlation"] == pytest.approx(1)
    assert found["variance_between_texts"] == pytest.approx(1)
    assert found["hard_elsewhere_if_hard"] == 1
    assert found["hard_elsewhere_if_easy"] == found["hard_elsewhere_if_normal_like"] == 0
    assert found["hard_elsewhere_if_between"] is None


def test_texts_that_decide_nothing_leave_all_to_chance(bench):
    rng = np.random.default_rng(0)
    hardness = rng.exponential(4, (4, 2000))
    found = bench.figures(hardness, np.where(hardness < 4, "hard", "easy"))
    assert found["rank_correlation"] == pytest.approx(0, abs=0.05)
    assert found["variance_between_texts"] == pytest.approx(0, abs=0.05)
    assert found["hard_elsewhere_if_hard"] == pytest.approx(found["hard"], abs=0.03)
    assert found["hard_elsewhere_if_easy"] == pytest.approx(found["hard"], abs=0.03)


def test_a_share_of_the_variance_is_found(bench):
    rng = np.random.default_rng(0)
    logs = 2 + rng.normal(0, 0.6, 4000) + rng.normal(0, 0.3, (4, 4000))
    found = bench.figures(np.expm1(logs.clip(0)), np.full((4, 4000), "hard"))
    assert found["variance_between_texts"] == pytest.approx(0.36 / 0.45, abs=0.02)
