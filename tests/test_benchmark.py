from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kka_ray.benchmark import CHECKS, collect, demo, table
from kka_ray.config.models import RunConfig
from kka_ray.errors import ConfigError


def summary(kka: float = 0.97, hard: tuple[float, float] = (0.2, 0.4)) -> dict:
    means = {"baseline": 0.9, "zeroth": 0.93, "kka": kka, "noise": 0.91, "normal_views": 0.905}
    arms = {arm: {"mean": mean} for arm, mean in means.items()}
    return {
        "detector": "simplenet",
        "versions": {},
        "detectors": {
            "simplenet": arms | {"cutpaste": {"mean": 0.92}},
            "knn": {"baseline": {"mean": 0.91}},
        },
        "generated_fraction": 0.05,
        "rounds": [{"hard_rate": h, "diversity": d} for h, d in zip(hard, (0.5, 0.45), strict=True)],
        "truth": {"kept_normal_share": 0.02, "spearman": 0.6},
    }


def test_means_over_the_seeds_are_held_against_the_ranges() -> None:
    result = collect([summary(), summary(kka=0.99)])
    gain = result["checks"]["KKA minus the better without anomalies"]
    assert gain["mean"] == pytest.approx(0.98 - 0.91)
    assert gain["per_seed"] == pytest.approx([0.06, 0.08])
    assert gain["low"] == 0.05
    assert all(row["passed"] for row in result["checks"].values())
    assert result["auc"]["simplenet"]["kka"]["mean"] == pytest.approx(0.98)
    assert table(result).row_count == len(CHECKS)


@pytest.mark.parametrize(
    ("run", "failed"),
    [
        (summary(kka=0.95), "KKA minus the better without anomalies"),
        (summary(kka=0.915), "KKA minus zero-th"),
        (summary(kka=summary()["detectors"]["simplenet"]["zeroth"]["mean"]), "KKA minus zero-th"),
        (summary(hard=(0.1, 0.4)), "hard rate in round 0"),
        (summary(hard=(0.3, 0.35)), "hard rate of the last round over that of round 0"),
    ],
)
def test_a_measure_out_of_its_range_fails(run: dict, failed: str) -> None:
    assert not collect([run])["checks"][failed]["passed"]


def test_a_seed_that_kept_no_image_is_a_gap_and_passes_no_check_of_it() -> None:
    none = summary() | {"truth": {}, "generated_fraction": 0.0}
    none["detectors"] = {"simplenet": {"baseline": {"mean": 0.9}}, "knn": {"baseline": {"mean": 0.91}}}
    result = collect([none, summary()])
    gain = result["checks"]["KKA minus zero-th"]
    assert gain["per_seed"] == [None, pytest.approx(0.04)]
    assert (gain["mean"], gain["passed"]) == (pytest.approx(0.04), False)
    assert result["checks"]["truly normal among the kept"]["per_seed"] == [None, 0.02]
    assert result["checks"]["better of the two without anomalies"]["per_seed"] == [0.91, 0.91]
    assert result["auc"]["simplenet"]["noise"]["per_seed"] == [None, 0.91]
    assert "0.0400 ± 0.0000 in 1 of 2 seeds" in shown(result)
    alone = collect([none])
    assert alone["checks"]["KKA minus zero-th"]["mean"] is None
    assert "not measured" in shown(alone)
    assert alone["auc"].keys() == {"simplenet", "knn"}


def shown(result: dict) -> str:
    heard = Console(file=StringIO(), width=200)
    heard.print(table(result))
    return heard.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("headline", ["fused", "knn"])
def test_a_headline_that_lacks_an_arm_is_refused_before_the_first_run(tmp_path: Path, headline: str) -> None:
    config = RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}, "detect": {"headline": headline}})
    with pytest.raises(ConfigError, match=rf"a detect.headline that learns from anomalies .* \(it is {headline}\)"):
        demo(config, 1, tmp_path / "demo.json", pytest.fail, pytest.fail, verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_without_what_is_checked_is_refused_before_the_first_run(tmp_path: Path) -> None:
    values = {"name": "x", "data": {"kind": "cifar100", "path": "cifar100"}, "detect": {"controls": ["noise"]}}
    config = RunConfig.model_validate(values)
    with pytest.raises(ConfigError, match=r"data.kind: flowers.*; cutpaste among detect.controls; normal_views among"):
        demo(config, 1, tmp_path / "demo.json", pytest.fail, pytest.fail, verbose=False)
    assert list(tmp_path.iterdir()) == []
