"""Sweeps as they are read: trials from parameters, names and values that are refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kka_ray.config import RunConfig
from kka_ray.config.sweep import SweepConfig, champion_config, dotted_names, load_sweep, points
from kka_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]


def write(folder: Path, **values: Any) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump({"name": "base", "data": {"kind": "flowers"}}))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "run": "run.yaml", **values}))
    return path


def test_a_grid_makes_every_combination_as_valid_run_configurations(tmp_path: Path) -> None:
    path = write(tmp_path, parameters={"loop.rounds": {"grid": [0, 2]}, "preference.beta": {"grid": [0.1, 0.3]}})
    sweep = load_sweep(path)
    assert [(t.config.loop.rounds, t.config.preference.beta) for t in sweep.trials] == [
        (0, 0.1),
        (0, 0.3),
        (2, 0.1),
        (2, 0.3),
    ]
    assert [t.number for t in sweep.trials] == [0, 1, 2, 3]
    assert len({t.config.name for t in sweep.trials}) == 4
    assert sweep.base.loop.rounds == RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}}).loop.rounds


def test_random_draws_stay_in_their_range_and_depend_on_the_seed() -> None:
    def drawn(seed: int) -> list[dict[str, Any]]:
        parameters = {
            "preference.beta": {"loguniform": [0.01, 1.0]},
            "confusion.upper": {"uniform": [2, 4]},
            "loop.mode": {"choice": ["rep", "add"]},
        }
        return points(
            SweepConfig.model_validate({"name": "s", "run": "r", "parameters": parameters, "trials": 40, "seed": seed})
        )

    first = drawn(0)
    assert len(first) == 40
    assert all(0.01 <= p["preference.beta"] <= 1.0 and 2 <= p["confusion.upper"] <= 4 for p in first)
    assert {p["loop.mode"] for p in first} == {"rep", "add"}
    # Half of a loguniform range lies below its geometric mean; of a uniform one a tenth would.
    assert 10 <= sum(p["preference.beta"] < 0.1 for p in first) <= 30
    assert drawn(0) == first
    assert drawn(1) != first


def test_another_parameter_does_not_change_the_draws_of_the_first() -> None:
    def betas(**more: Any) -> list[Any]:
        parameters = {"preference.beta": {"uniform": [0.1, 0.2]}, **more}
        config = SweepConfig.model_validate({"name": "s", "run": "r", "parameters": parameters, "trials": 3})
        return [p["preference.beta"] for p in points(config)]

    assert betas() == betas(**{"confusion.gap": {"uniform": [0, 1]}})


def test_a_larger_sweep_tries_the_points_of_the_smaller_one_too() -> None:
    def tried(trials: int, *rounds: int) -> list[dict[str, Any]]:
        parameters = {"loop.rounds": {"grid": list(rounds)}, "preference.beta": {"uniform": [0.1, 0.2]}}
        return points(SweepConfig.model_validate({"name": "s", "run": "r", "parameters": parameters, "trials": trials}))

    first = tried(2, 0, 1, 2)
    assert tried(3, 0, 1, 2)[: len(first)] == first
    wider = tried(2, 0, 3, 1, 2)
    assert all(point in wider for point in first)
    assert len({p["preference.beta"] for p in wider}) == 8


def test_equal_points_are_there_once_and_draws_repeat_at_each_point_of_the_grid() -> None:
    parameters = {"loop.rounds": {"grid": [0, 1]}, "loop.mode": {"choice": ["rep"]}}
    config = SweepConfig.model_validate({"name": "s", "run": "r", "parameters": parameters, "trials": 5})
    assert points(config) == [{"loop.rounds": 0, "loop.mode": "rep"}, {"loop.rounds": 1, "loop.mode": "rep"}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parameters": {"preference.betta": {"grid": [1]}}}, "did you mean 'preference.beta'"),
        ({"parameters": {"seed": {"grid": [1, 2]}}}, "cannot be compared"),
        ({"parameters": {"data.normals": {"grid": [100, 200]}}}, "cannot be compared"),
        ({"parameters": {"cluster.in_flight": {"grid": [1]}}}, "no parameter of the method"),
        ({"parameters": {"loop.rounds": {"gird": [1]}}}, "exactly one of the keys grid"),
        ({"parameters": {"loop.rounds": {"grid": [1], "choice": [1]}}}, "exactly one of the keys grid"),
        ({"parameters": {"preference.beta": {"uniform": [0.3, 0.1]}}, "trials": 2}, "smaller number to a larger"),
        ({"parameters": {"preference.beta": {"loguniform": [0, 1]}}, "trials": 2}, "begins above 0"),
        ({"parameters": {"preference.beta": {"uniform": [0.1, 0.3]}}}, "say how often with `trials`"),
        ({"parameters": {"loop.rounds": {"grid": [1]}}, "trials": 3}, "every parameter is a grid"),
        ({"parameters": {"loop.rounds": {"grid": [1]}}, "objective": "test_auc"}, "objective"),
        ({"parameters": {"loop.rounds": {"grid": [0, -1]}}}, "trial 1 \\(loop.rounds=-1\\)"),
        ({"parameters": {"detect.headline": {"grid": ["knn"]}}}, "ignores anomalies"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_a_reason(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sweep(write(tmp_path, **values))


def test_another_kind_replaces_the_whole_section(tmp_path: Path) -> None:
    path = write(tmp_path, parameters={"confusion.evaluator.kind": {"grid": ["deep_sad", "knn"]}})
    assert [t.config.confusion.evaluator.kind for t in load_sweep(path).trials] == ["deep_sad", "knn"]


def test_an_inline_run_extends_a_file_and_takes_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path, run={"extends": "run.yaml", "loop": {"lines": 32}}, parameters={"loop.rounds": {"grid": [1]}}
    )
    sweep = load_sweep(path, ["run.loop.lines=16", "concurrency=2"])
    assert (sweep.base.name, sweep.base.loop.lines, sweep.config.concurrency) == ("base", 16, 2)


def test_an_override_of_the_run_that_does_not_say_so_is_told_how(tmp_path: Path) -> None:
    path = write(tmp_path, parameters={"loop.rounds": {"grid": [1]}})
    with pytest.raises(ConfigError, match=r"-o run\.loop\.lines=16"):
        load_sweep(path, ["loop.lines=16"])


@pytest.mark.parametrize("run", ["run.yaml", {"extends": "run.yaml", "loop": {"lines": 32}}])
def test_a_sweep_holds_its_run_with_what_that_extends(tmp_path: Path, run: Any) -> None:
    path = write(tmp_path, run=run, parameters={"loop.rounds": {"grid": [1]}})
    own = {} if run == "run.yaml" else {"loop": {"lines": 32}}
    before = load_sweep(path).config.run
    assert before == {"name": "base", "data": {"kind": "flowers"}} | own
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "base", "data": {"kind": "flowers"}, "seed": 3}))
    assert load_sweep(path).config.run == before | {"seed": 3}


def test_a_champion_has_a_name_of_its_content(tmp_path: Path) -> None:
    first = load_sweep(write(tmp_path, parameters={"loop.rounds": {"grid": [1, 2]}}))
    second = load_sweep(write(tmp_path, parameters={"loop.rounds": {"grid": [2, 3]}}))
    names = [champion_config(first, t).name for t in first.trials]
    assert names[0] != names[1]
    assert champion_config(second, second.trials[0]).name == names[1]


def test_names_reach_into_unions_and_not_into_lists() -> None:
    names = set(dotted_names(RunConfig))
    assert {"loop.rounds", "confusion.evaluator.epochs", "confusion.evaluator.neighbours"} <= names
    assert {"render.mask", "render.mask.min_area"} <= names
    assert "detect.detectors" in names
    assert not any(name.startswith("detect.detectors.") for name in names)


def test_every_shipped_sweep_loads() -> None:
    files = sorted((ROOT / "tune_configs").glob("*.yaml"))
    sizes = {file.stem: len(load_sweep(file).trials) for file in files}
    assert sizes["smoke"] >= 6
    assert sizes["hardness_beta_rounds"] == 27
