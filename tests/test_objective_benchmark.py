from pathlib import Path

import pytest

from tests.scripts import load_script


def test_a_measure_that_saturates_ranks_nothing_and_one_that_follows_the_test_ranks_all() -> None:
    bench = load_script(Path(__file__).parents[1] / "benchmarks" / "objective.py")
    tests = {"a": 0.90, "b": 0.92, "c": 0.95}
    rows = [
        {"run": run, "arm": arm, "seed": 0, "test": auc, "validation": 1 - auc, "drawn": auc - 0.1, "objective": auc**2}
        for run in ("one", "two")
        for arm, auc in tests.items()
    ]
    found = bench.summary(rows)
    assert [row["arm"] for row in found["arms"]] == ["a", "b", "c"]
    assert found["arms"][0]["drawn"] == pytest.approx(0.8)
    assert found["rank_correlation"] == pytest.approx({"validation": -1, "drawn": 1, "objective": 1})
