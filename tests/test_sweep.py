"""Sweeps: the reference that measures trials, what is kept out of their sets, and trials that end cleanly."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kka_ray import assets, experiment, objective, sweep
from kka_ray.cluster import fits, train
from kka_ray.cluster.plan import plan_of_sweep, plan_of_trials
from kka_ray.cluster.streaming import Drawn
from kka_ray.config import load
from kka_ray.config.models import Cifar100Data, RunConfig
from kka_ray.config.sweep import Sweep, Trial, champion_config, load_sweep
from kka_ray.confusion.judge import JudgeResult, LatentMap
from kka_ray.confusion.selection import KeptImage
from kka_ray.data.decode import encode_png
from kka_ray.errors import ConfigError, DataError, ResourceError, StageError, StoreError
from kka_ray.evaluation import unseen_drawn_normals
from kka_ray.experiment import absolute, claim, computing
from kka_ray.features.base import Features
from kka_ray.loop import Loop, LoopResult, Round
from kka_ray.objective import Reference, mean_aucs, reference_of, validation_auc
from kka_ray.places import Place
from kka_ray.prepare import prepare
from kka_ray.records import Description, Verdict
from kka_ray.store import Store
from kka_ray.sweep import Outcome, best_of, count_outputs, measure, run_trials, table, to_json
from tests.drawn import drawn_of

ROOT = Path(__file__).parents[1]
LABELS = ("hard", "between", "easy", "normal_like")


def line(id_: str, text: str, round: int = 0) -> Description:
    return Description(id_, "p000", round, text, text, "ok")


def verdict(id_: str, label: Any, round: int = 0) -> Verdict:
    return Verdict(id_, round, 0, 1.0, 3.0, label)


def drawn(ids: list[str]) -> Drawn:
    images = [np.full((4, 4, 3), i % 256, np.uint8) for i in range(len(ids))]
    return drawn_of(ids, images, Features(np.zeros((len(ids), 2), np.float32)))


def played(number: int, descriptions: list[Description], kept: list[KeptImage]) -> Round:
    ids = [d.id for d in descriptions]
    return Round(number, descriptions, drawn(ids), kept, "ok", None, 0.5, 0.5, 1.0, 9.0, {}, {})


def zeroth(count: int = 80, labels: tuple[str, ...] = LABELS, kept: tuple[str, ...] = ()) -> LoopResult:
    """A loop's result after round 0: `count` images, their labels in turn."""
    descriptions = [line(f"r0-p000-s{i:03d}", f"a thing number {i}") for i in range(count)]
    verdicts = [verdict(d.id, labels[i % len(labels)]) for i, d in enumerate(descriptions)]
    none = np.zeros((0, 2), np.float32)
    audit = JudgeResult(verdicts, {}, None, LatentMap(none, none, none, none))
    rounds = [played(0, descriptions, [KeptImage(k, 0) for k in kept])]
    normals = drawn([f"n{i:03d}" for i in range(12)])
    return LoopResult([], rounds, audit, {v.id: v for v in verdicts}, normals=normals)


def test_the_reference_holds_the_hard_and_between_images_and_withholds_all_that_was_written() -> None:
    result = zeroth()
    reference = reference_of(result)
    label = {v.id: v.label for v in result.audit.verdicts} if result.audit else {}
    assert reference.ids == tuple(i for i in sorted(label) if label[i] in ("hard", "between"))
    assert [int(image[0, 0, 0]) for image in reference.images] == [int(id_[-3:]) for id_ in reference.ids]
    assert all(reference.withholds(d) for d in result.rounds[0].descriptions)


def test_the_reference_depends_neither_on_the_trial_nor_on_what_was_kept() -> None:
    assert reference_of(zeroth(kept=("r0-p000-s000",))).ids == reference_of(zeroth()).ids


def test_copies_of_a_withheld_description_are_withheld_in_any_round() -> None:
    result = zeroth()
    reference = reference_of(result)
    original = next(d for d in result.rounds[0].descriptions if reference.withholds(d))
    assert reference.withholds(line("r2-p007-s001", f" {original.text.upper()}  ", 2))
    assert not reference.withholds(line(original.id, "another line under the same id"))


def test_a_reference_that_is_too_small_says_what_was_drawn() -> None:
    with pytest.raises(StageError, match=r"fewer than 5.*80 easy.*loop\.lines"):
        reference_of(zeroth(labels=("easy",)))


def test_images_that_only_collapsed_evaluators_judged_are_no_reference() -> None:
    result = zeroth()
    assert result.audit is not None
    collapsed = replace(result.audit, diagnostics={"fold_0/collapsed": 1.0})
    with pytest.raises(StageError, match="has 0 hard or between images.*collapsed judged 80 of them"):
        reference_of(replace(result, audit=collapsed))


def bare_loop(mode: str, rounds: int, budget: int, reference: Reference) -> Loop:
    """A loop without its engines: what selects the kept set needs none."""
    loop = Loop.__new__(Loop)
    values = {"name": "x", "data": {"kind": "flowers"}, "loop": {"mode": mode, "rounds": rounds}}
    loop.config = RunConfig.model_validate(values)
    loop.budget, loop.withheld, loop._withheld_ids = budget, reference.withholds, set()
    return loop


@pytest.mark.parametrize("mode", ["rep", "add"])
def test_no_round_keeps_a_withheld_image_and_others_take_its_place(mode: str) -> None:
    reference = reference_of(zeroth(40))
    loop = bare_loop(mode, 1, 20, reference)
    # Of the first round's eighty descriptions the reference has forty, under ids of its own.
    result = zeroth(labels=("hard",))
    first = result.rounds.pop()
    kept = loop._keep(result, first.drawn, first.descriptions, 0)
    assert len(kept) == (20 if mode == "rep" else 10)
    result.rounds.append(played(0, first.descriptions, kept))
    copies = [line(f"r1-{d.id[3:]}", d.text, 1) for d in first.descriptions if reference.withholds(d)]
    new = [line(f"r1-p009-s{i:03d}", f"something new {i}", 1) for i in range(10)]
    everything = [*first.descriptions, *copies, *new]
    result.verdicts = {d.id: verdict(d.id, "hard", d.round) for d in everything}
    kept = loop._keep(result, drawn([d.id for d in [*copies, *new]]), [*copies, *new], 1)
    texts = {d.id: d for d in everything}
    assert len(copies) == 40
    assert len(kept) == 20
    assert not any(reference.withholds(texts[k.id]) for k in kept)


def test_a_kept_set_with_the_reference_in_it_is_refused(tmp_path: Path) -> None:
    reference = reference_of(zeroth())
    with pytest.raises(StageError, match="holds 1 withheld"):
        validation_auc(None, None, None, zeroth(kept=reference.ids[:1]), reference)  # type: ignore[arg-type]


class ByFirstFeature:
    """A detector whose score is the first feature."""

    def score(self, features: Features) -> Any:
        return type("Scores", (), {"score": features.pooled[:, 0]})()


def test_the_objective_weighs_real_and_drawn_normals_alike_however_many_there_are() -> None:
    real = Features(np.array([[0.0], [1.0], [2.0], [3.0]], np.float32))
    drawn = Features(np.array([[3.0]], np.float32))
    anomalies = Features(np.array([[2.5], [4.0]], np.float32))
    assert mean_aucs([ByFirstFeature()], [real], anomalies) == [7 / 8]  # type: ignore[list-item]
    assert mean_aucs([ByFirstFeature()], [real, drawn], anomalies) == [(7 / 8 + 1 / 2) / 2]  # type: ignore[list-item]


def test_drawn_normals_that_train_detectors_do_not_measure_them() -> None:
    result = zeroth()
    result.normals.features = Features(np.arange(24, dtype=np.float32).reshape(12, 2))
    config = RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}, "detect": {"drawn_normals": True}})
    assert [int(image[0, 0, 0]) for image in reference_of(result).normals] == [1, 3, 5, 7, 9, 11]
    assert unseen_drawn_normals(config, result).pooled[:, 0].tolist() == [2, 6, 10, 14, 18, 22]


def test_few_drawn_normals_are_no_measure() -> None:
    result = zeroth()
    result.normals = drawn([f"n{i:03d}" for i in range(9)])
    with pytest.raises(StageError, match=r"4 drawn normals .* fewer than 5.*run\.render\.normals to 10"):
        reference_of(result)


@pytest.mark.skipif(not assets.is_present("builtin:efficientnet-lite0"), reason="the backbone is not installed")
def test_a_trial_is_measured_with_detectors_of_its_kept_set_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[dict[str, Any]] = []

    def run(
        name: str, function: Callable[[dict[str, Any]], None], arguments: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        jobs.append(arguments)
        with computing(1):  # as in a process of its own, whose threads are not ours
            function({**arguments, "threads": 1})

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(fits, "rank", lambda: (0, 1))
    monkeypatch.setattr(objective, "FEWEST", 1)
    values = {
        "name": "x",
        "data": {"kind": "flowers", "normals": 20},
        "detect": {"detectors": [{"kind": "fused"}, {"kind": "knn"}], "headline": "fused", "seeds": 2},
    }
    config, store = RunConfig.model_validate(values), Store(str(tmp_path))
    prepared = prepare(config, store)
    noise = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(12)]
    apart, result = zeroth(6, labels=("hard",)), zeroth(12, labels=("hard",))
    first = result.rounds[0]
    for round_ in (apart.rounds[0], first):
        shown = noise[: len(round_.drawn.ids)]
        round_.drawn.renderings = drawn_of(round_.drawn.ids, shown, round_.drawn.features).renderings
    first.drawn.features = prepared.backbone.extract(noise, prepared.patches)
    shown = list(prepared.normals.train.images[:4])
    apart.normals = drawn_of([f"n{i}" for i in range(4)], shown, prepared.train.take(range(4)))
    reference = reference_of(apart)
    kept = [KeptImage(d.id, 0, "hard") for d in first.descriptions if not reference.withholds(d)]
    first.kept.extend(kept)

    values_of_seeds = validation_auc(config, store, prepared, result, reference)
    # Noise is easily told from flowers, by a head that saw other noise.
    assert len(values_of_seeds) == 2
    assert min(values_of_seeds) > 0.9
    assert {f["detector"].kind for f in jobs[0]["fits"]} == {"fused"}
    (anomalies,) = {f["anomalies"] for f in jobs[0]["fits"]}
    output = store.find("features", anomalies)
    assert output is not None
    assert output.marker["inputs"]["set"] == [k.id for k in kept]
    assert validation_auc(config, store, prepared, result, reference) == values_of_seeds
    assert len(jobs) == 1, "the second time all fits are in the store"


@pytest.fixture
def small() -> Sweep:
    return load_sweep(ROOT / "tune_configs" / "smoke.yaml")


def test_a_trial_fits_two_cpus_and_two_trials_do_not(small: Sweep) -> None:
    plan_of_trials(small.base, 1).check([{"CPU": 2.0}])
    with pytest.raises(ResourceError, match="does not fit"):
        plan_of_trials(small.base, 2).check([{"CPU": 2.0}])
    plan_of_trials(small.base, 2).check([{"CPU": 4.0}])
    assert sum(b["CPU"] for b in sweep._resources(small.base).bundles) == pytest.approx(0.25 + 4 * 0.15)


def test_a_trial_that_would_never_get_its_places_is_refused(small: Sweep) -> None:
    varied = ['parameters={"preference.workers": {"grid": [1, 4]}}', "trials=null", "run.preference.micro_batch=1"]
    wide = load_sweep(ROOT / "tune_configs" / "smoke.yaml", varied)
    plan_of_sweep(small).check([{"CPU": 2.0}])
    assert set(plan_of_trials(wide.trials[0].config, 1).phases) < set(plan_of_sweep(wide).phases)
    with pytest.raises(ResourceError, match="does not fit"):
        plan_of_sweep(wide).check([{"CPU": 2.0}])


def test_outputs_count_as_found_if_they_were_there_before() -> None:
    outputs = [("render", "a"), ("render", "b"), ("dpo", "c")]
    assert count_outputs(outputs, {("render", "a"), ("fit", "z")}) == ({"dpo": 1, "render": 1}, {"render": 1})


def test_the_best_is_the_first_of_the_largest_and_failures_do_not_count() -> None:
    rows = [Outcome(0, {}, error="no"), Outcome(1, {}, 0.7), Outcome(2, {}, 0.9), Outcome(3, {}, 0.9)]
    assert best_of(rows).number == 2
    with pytest.raises(StageError, match="of 1 trial none came to its end; the first: no"):
        best_of(rows[:1])


def test_the_results_are_plain_json_and_a_row_a_trial(small: Sweep, tmp_path: Path) -> None:
    rows = [
        Outcome(t.number, dict(t.overrides), 0.5 + t.number / 100, [0.5], 3.0, outputs=[["render", "k"]])
        for t in small.trials
    ]
    rows[1] = Outcome(1, dict(small.trials[1].overrides), error="StageError: no")
    result = sweep.SweepResult(str(tmp_path), rows, best_of(rows), ("r0-p000-s001",), None, 9.0)
    sweep._write(Place(str(tmp_path), tmp_path), result, small, small.trials[0].config, [("render", "base")])
    assert json.loads((tmp_path / "references.json").read_text()) == [["render", "base"], ["render", "k"]]
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written == to_json(result, small)
    assert [t["objective"] is None for t in written["trials"]] == [False, True, False, False, False, False]
    assert written["best"] == len(rows) - 1
    assert table(result, small).row_count == len(rows)


def test_the_table_fits_a_narrow_terminal(small: Sweep, tmp_path: Path) -> None:
    rows = [Outcome(t.number, dict(t.overrides), 0.9 + t.number / 100, [0.5], 3000.0) for t in small.trials]
    result = sweep.SweepResult(str(tmp_path), rows, best_of(rows), (), None, 9.0)
    heard = Console(file=StringIO(), width=80)
    heard.print(table(result, small))
    shown = heard.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert "0.9500 *" in shown
    assert {"rounds", "upper", "beta"} < set(shown.split())


def test_parameters_whose_names_end_alike_keep_the_whole() -> None:
    assert sweep._headings(["loop.rounds", "render.steps", "preference.steps"]) == [
        *("rounds", "render.steps", "preference.steps"),
    ]


class FakePools:
    """Stands in for the pools: it remembers that they were closed."""

    closed = 0

    def __init__(self, config: RunConfig, store: str) -> None:
        pass

    def close(self) -> None:
        FakePools.closed += 1


class FailingLoop:
    """Stands in for the loop."""

    def __init__(self, *arguments: Any, withheld: Any) -> None:
        pass

    def run(self) -> LoopResult:
        raise StageError("nothing was drawn")


def test_a_trial_that_fails_closes_its_pools_and_is_a_row(
    small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "Loop", FailingLoop)
    monkeypatch.setattr(sweep, "Pools", FakePools)
    before = FakePools.closed
    monkeypatch.setattr(sweep, "prepare", lambda *_: None)
    config = small.base.model_copy(update={"store": small.base.store.model_copy(update={"uri": str(tmp_path)})})
    outcome = measure(small.trials[0], config, reference_of(zeroth()), None)
    assert outcome.error == "StageError: nothing was drawn"
    assert outcome.objective is None
    assert FakePools.closed == before + 1


def test_the_reference_comes_from_a_loop_without_rounds_and_with_a_seed_that_no_trial_has(
    small: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunConfig] = []

    class Zeroth(FailingLoop):
        def __init__(self, config: RunConfig, *arguments: Any) -> None:
            seen.append(config)

        def run(self) -> LoopResult:
            return zeroth()

    monkeypatch.setattr(objective, "Loop", Zeroth)
    monkeypatch.setattr(objective, "Pools", FakePools)
    before = FakePools.closed
    objective.make_reference(small.base, SimpleNamespace(uri=""), None, sweep._quiet)  # type: ignore[arg-type]
    assert [c.loop.rounds for c in seen] == [0]
    assert seen[0].seed not in {t.config.seed for t in small.trials}
    assert FakePools.closed == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("champion", [True, False])
def test_a_sweep_writes_its_results_and_a_tree_of_tracked_runs(
    small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, champion: bool
) -> None:
    """The whole of `run` with trials in this process and without engines; tracking is real."""
    from mlflow import MlflowClient

    asked: list[tuple[str, str | None]] = []

    def measured(trial: Trial, config: RunConfig, reference: Reference, mlflow_run: str | None) -> Outcome:
        error = "StageError: no" if trial.number == 1 else None
        score = None if error else trial.number / 10
        outputs = [["render", "k"]]
        return Outcome(trial.number, dict(trial.overrides), score, outputs=outputs, mlflow=mlflow_run, error=error)

    def trials(function: Callable[[dict[str, Any], Any], None], job: Any, swept: Sweep, note: Any) -> list[Outcome]:
        reported: list[Outcome] = []
        monkeypatch.setattr(sweep.tune, "report", lambda metrics: reported.append(Outcome(**metrics["outcome"])))
        for trial in swept.trials:
            function({"trial": trial.number}, job)
        return reported

    def whole_run(config: RunConfig, *arguments: Any, verbose: bool, parent: str | None) -> Any:
        asked.append((config.name, parent))
        auc = {"baseline": None, "zeroth": None, "kka": {"mean": 0.9, "std": 0.0, "per_seed": [0.9]}}
        return SimpleNamespace(summary={"name": config.name, "config_hash": "h", "detector": "simplenet", "auc": auc})

    monkeypatch.setattr(sweep, "session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(sweep, "nodes", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(sweep, "prepare", lambda *_: None)
    monkeypatch.setattr(sweep, "make_reference", lambda *_: reference_of(zeroth()))
    monkeypatch.setattr(sweep, "measure", measured)
    monkeypatch.setattr(sweep, "run_trials", trials)
    monkeypatch.setattr(sweep, "run_experiment", whole_run)
    here = {"output": str(tmp_path)}
    base = small.base.model_copy(update=here)
    ours = tuple(Trial(t.number, t.overrides, t.config.model_copy(update=here)) for t in small.trials)
    chosen = small.config.model_copy(update={"champion_evaluation": champion})
    result = sweep.run(Sweep(chosen, base, ours), sweep._quiet, pytest.fail, lambda text: None)

    assert result.best.number == 5
    folder = tmp_path / "smoke"
    assert load(folder / "best.yaml", RunConfig).loop.rounds == ours[5].config.loop.rounds
    assert json.loads((folder / "references.json").read_text()) == [["render", "k"]]
    written = json.loads((folder / "sweep.json").read_text())
    assert [t["objective"] for t in written["trials"]] == [0.0, None, 0.2, 0.3, 0.4, 0.5]
    assert (written["champion"] is not None) == champion
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "kka"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {r.data.metrics.get("validation_auc") for r in children} == {0.0, None, 0.2, 0.3, 0.4, 0.5}
    assert sorted(r.info.status for r in children) == ["FAILED"] + ["FINISHED"] * 5
    assert all(set(r.data.params) == set(small.config.parameters) for r in children)
    assert parent.info.status == "FINISHED"
    assert asked == ([(load(folder / "best.yaml", RunConfig).name, parent.info.run_id)] if champion else [])


def test_a_trial_goes_on_where_mlflow_cannot_be_reached_as_it_begins(
    small: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[dict[str, Any]] = []

    def out(*_: Any, **__: Any) -> str:
        raise ResourceError("MLflow does not take the results")

    monkeypatch.setattr(sweep.tracking, "start_run", out)
    monkeypatch.setattr(sweep.tracking, "end_run", lambda *_, **__: pytest.fail("there is no run to end"))
    monkeypatch.setattr(sweep, "measure", lambda trial, *rest: Outcome(trial.number, {}, 0.5, mlflow=rest[-1]))
    monkeypatch.setattr(sweep.tune, "report", lambda metrics: reported.append(metrics["outcome"]))
    job = sweep._Job(small.trials, reference_of(zeroth()), "http://127.0.0.1:9", "kka", "parent")
    sweep.run_trial({"trial": 0}, job)
    assert [(o["objective"], o["mlflow"]) for o in reported] == [(0.5, None)]
    monkeypatch.setattr(sweep, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sweep.run_trial({"trial": 0}, job)


def test_trials_keep_what_they_make_in_the_drivers_folders(
    small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune starts each trial in a folder of its own."""
    seen: list[RunConfig] = []

    def measured(trial: Trial, config: RunConfig, *_: Any) -> Outcome:
        seen.append(absolute(config))
        return Outcome(trial.number, {}, 0.5)

    def trials(function: Callable[[dict[str, Any], Any], None], job: Any, swept: Sweep, note: Any) -> list[Outcome]:
        (tmp_path / "trial").mkdir()
        monkeypatch.chdir(tmp_path / "trial")
        for trial in swept.trials:
            function({"trial": trial.number}, job)
        monkeypatch.chdir(tmp_path)
        return [Outcome(t.number, t.overrides, 0.5) for t in swept.trials]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(sweep, "nodes", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(sweep, "prepare", lambda *_: None)
    monkeypatch.setattr(sweep, "warnings", lambda *_: [])
    monkeypatch.setattr(sweep, "make_reference", lambda *_: reference_of(zeroth()))
    monkeypatch.setattr(sweep, "measure", measured)
    monkeypatch.setattr(sweep, "run_trials", trials)
    monkeypatch.setattr(sweep.tune, "report", lambda metrics: None)
    monkeypatch.setattr(sweep.tracking, "start_run", lambda *_, **__: "run")
    monkeypatch.setattr(sweep.tracking, "end_run", lambda *_, **__: None)
    (tmp_path / "cifar100").mkdir()
    for split in ("train", "test"):
        (tmp_path / "cifar100" / f"{split}-0.parquet").touch()
    here = {"data": Cifar100Data(kind="cifar100", path="cifar100"), "output": "out"}
    ours = tuple(replace(t, config=t.config.model_copy(update=here)) for t in small.trials)
    config = small.config.model_copy(update={"champion_evaluation": False})
    sweep.run(Sweep(config, small.base.model_copy(update=here), ours), sweep._quiet, pytest.fail, lambda text: None)

    assert seen == [absolute(t.config) for t in ours]
    assert all(c.output == str(tmp_path / "out") for c in seen)
    best = load(tmp_path / "out" / "smoke" / "best.yaml", RunConfig)
    assert best == champion_config(Sweep(config, small.base, ours), ours[0]), "its name has nothing of this folder"


def test_outside_images_that_the_best_trial_would_lack_end_a_sweep_before_its_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = tmp_path / "others"
    overrides = [
        'parameters={"loop.budget": {"grid": [0.02, 0.03, 0.01]}}',
        "trials=null",
        f"run.detect={{seeds: 1, controls: [outside], outside: {others}}}",
        f"run.output={tmp_path / 'runs'}",
        f"run.store.uri={tmp_path / 'store'}",
    ]
    swept = load_sweep(ROOT / "tune_configs" / "smoke.yaml", overrides)
    monkeypatch.setattr(sweep, "session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(sweep, "nodes", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(sweep, "prepare", lambda *_: SimpleNamespace(count=100))
    monkeypatch.setattr(sweep, "make_reference", lambda *_: pytest.fail("a round was drawn"))
    with pytest.raises(DataError, match=r"detect\.outside: .*/others is no folder"):
        sweep.run(swept, sweep._quiet, pytest.fail, pytest.fail)
    assert list(tmp_path.iterdir()) == []
    others.mkdir()
    for n in range(2):
        (others / f"{n}.png").write_bytes(encode_png(np.full((8, 8, 3), 80 * n, np.uint8)))
    with pytest.raises(DataError, match=r"detect\.outside: .*holds 2 images, but 3 outside images are wanted"):
        sweep.run(swept, sweep._quiet, pytest.fail, pytest.fail)


def test_a_sweep_looks_first_at_what_a_run_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [f"run.output={tmp_path / 'runs'}", f"run.store.uri={tmp_path / 'store'}"]

    def start(*overrides: str, say: Any = pytest.fail) -> None:
        sweep.run(
            load_sweep(ROOT / "tune_configs" / "smoke.yaml", [*there, *overrides]), sweep._quiet, say, pytest.fail
        )

    monkeypatch.setattr(experiment, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        start("run.preference.workers=1", "run.preference.load_in_4bit=true")
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as full:
        full.setattr(Store, "free_bytes", lambda _: 1_000_000)
        with pytest.raises(ResourceError, match=r"only 1 MB are free"):
            start()
    assert not (tmp_path / "runs" / "smoke").exists()

    def reference(*_: Any) -> Any:
        raise StageError(f"after {said}")

    said: list[str] = []
    monkeypatch.setattr(sweep, "session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(sweep, "nodes", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(sweep, "prepare", lambda *_: SimpleNamespace(count=100))
    monkeypatch.setattr(sweep, "warnings", lambda config, *_: [f"{config.render.pipeline} draws something else"])
    monkeypatch.setattr(sweep, "make_reference", reference)
    with pytest.raises(StageError, match=r"after \['builtin:flowers draws something else'\]"):
        start(say=said.append)


def test_a_sweep_that_is_started_again_refers_to_everything(small: Sweep, tmp_path: Path) -> None:
    sweep._claim(Place(str(tmp_path), tmp_path), small.config)
    (tmp_path / "references.json").write_text("[]")
    sweep._claim(Place(str(tmp_path), tmp_path), small.config)
    assert [f.name for f in tmp_path.iterdir()] == ["sweep.yaml"]


def test_a_sweep_keeps_its_folder_to_itself(small: Sweep, tmp_path: Path) -> None:
    place = Place(str(tmp_path), tmp_path)
    sweep._claim(place, small.config)
    written = (tmp_path / "sweep.yaml").read_text()
    more = small.config.model_copy(update={"concurrency": 2, "champion_evaluation": False})
    sweep._claim(place, more)  # the same points, elsewhere
    other = small.config.model_copy(update={"seed": 5})
    with pytest.raises(ConfigError, match=r"holds another sweep \(seed\).*-o name=NAME"):
        sweep._claim(place, other)
    with pytest.raises(ConfigError, match=r"holds a sweep; give the run another name"):
        claim(place, small.base, "h")
    assert (tmp_path / "sweep.yaml").read_text() != written  # of the one before
    assert [f.name for f in tmp_path.iterdir()] == ["sweep.yaml"]


def test_a_sweep_whose_base_changed_is_another_sweep(tmp_path: Path) -> None:
    base, swept = tmp_path / "base.yaml", tmp_path / "swept.yaml"
    swept.write_text("name: s\nrun: base.yaml\nparameters: {loop.rounds: {grid: [0, 1]}}\n")

    def started(values: str, name: str = "base") -> None:
        base.write_text(f"name: {name}\ndata: {{kind: flowers}}\n{values}")
        sweep._claim(Place(str(tmp_path / "s"), tmp_path / "s"), load_sweep(swept).config)

    started("loop: {lines: 32}\n")
    started("loop: {lines: 32}\ncluster: {in_flight: 3}\noutput: elsewhere\n", "other")  # the same results
    with pytest.raises(ConfigError, match=r"holds another sweep \(run\.loop\.lines\).*-o name=NAME"):
        started("loop: {lines: 64}\n")
    with pytest.raises(ConfigError, match=r"holds another sweep \(run\.render\.guidance\)"):
        started("loop: {lines: 32}\nrender: {guidance: null}\n")  # by default it is a number


def test_the_name_of_a_sweep_that_began_no_trial_is_free_for_it_when_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swept(*overrides: str, store: str = str(tmp_path / "store")) -> Sweep:
        there = (f"run.output={tmp_path / 'runs'}", f"run.store.uri={store}")
        return load_sweep(ROOT / "tune_configs" / "smoke.yaml", [*there, *overrides])

    def started(what: Sweep) -> None:
        sweep.run(what, sweep._quiet, pytest.fail, lambda text: None)

    def refuse(*_: Any, **__: Any) -> Any:
        raise StageError("refused")

    folder = tmp_path / "runs" / "smoke"
    with pytest.raises(StoreError, match="nosuch"):
        started(swept(store="nosuch://x"))
    assert not folder.exists()
    monkeypatch.setattr(sweep, "nodes", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(sweep, "prepare", lambda *_: None)
    monkeypatch.setattr(sweep, "warnings", lambda *_: [])
    monkeypatch.setattr(sweep, "session", refuse)
    with pytest.raises(StageError, match="refused"):
        started(swept())
    assert not folder.exists()
    monkeypatch.setattr(sweep, "session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(sweep, "make_reference", refuse)
    for lines in (48, 64):
        with pytest.raises(StageError, match="refused"):
            started(swept(f"run.loop.lines={lines}"))
        assert not folder.exists()

    def fill_the_disk(*_: Any) -> Any:
        raise ResourceError("the disk is full")

    monkeypatch.setattr(sweep, "make_reference", fill_the_disk)
    with pytest.raises(ResourceError, match="the disk is full"):
        started(swept())
    assert [f.name for f in folder.iterdir()] == ["sweep.yaml"], "what the store has of it is not to be collected"
    monkeypatch.setattr(sweep, "make_reference", refuse)
    (folder / "sweep.yaml").unlink()

    sweep._claim(Place(str(folder), folder), swept().config)  # and then interrupted
    with pytest.raises(StageError, match="refused"):
        started(swept())
    assert [f.name for f in folder.iterdir()] == ["sweep.yaml"]

    (folder / "sweep.yaml").unlink()
    monkeypatch.setattr(sweep, "make_reference", lambda *_: reference_of(zeroth()))
    monkeypatch.setattr(sweep.tracking, "start_run", lambda *_, **__: "run")
    monkeypatch.setattr(sweep.tracking, "end_run", lambda *_, **__: None)
    monkeypatch.setattr(sweep, "run_trials", refuse)
    with pytest.raises(StageError, match="refused"):
        started(swept())
    assert [f.name for f in folder.iterdir()] == ["sweep.yaml"], "its trials had begun"

    def with_a_fault(*_: Any) -> list[Outcome]:
        broken = Outcome(1, {}, error="ResourceError: the disk is full", interrupted=True)
        return [Outcome(0, {}, 0.5, [0.5]), broken]

    monkeypatch.setattr(sweep, "run_trials", with_a_fault)
    monkeypatch.setattr(sweep, "run_experiment", lambda *_, **__: pytest.fail("not all had their chance"))
    with pytest.raises(ResourceError, match=r"1 trial of 2 .*trial 1: .*the disk is full\. The same command"):
        started(swept())
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    assert [t["interrupted"] for t in trials] == [False, True]


def test_a_sweep_that_cannot_write_says_where(small: Sweep, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "smoke"
    with pytest.raises(ResourceError, match=f"cannot write the run's folder {folder}"):
        sweep._claim(Place(str(folder), folder), small.config)


def tiny() -> Callable[[dict[str, Any], Path], None]:
    """A trial with a pool in its placement group; made here so that it is sent by value.

    Trial 0 makes an output under a lease, 1 fails, 2 dies once, 3 runs a Ray Train job.
    """

    class Echo:
        def say(self, value: int) -> int:
            return value

    def trial(settings: dict[str, Any], job: Path) -> None:
        import ray
        from ray import tune

        from kka_ray.cluster import leases, train
        from kka_ray.config.models import ClusterConfig

        number = settings["trial"]
        worker = ray.remote(num_cpus=0.15)(Echo).remote()
        value = ray.get(worker.say.remote(number))
        if number == 0:
            store = leases.open_store(str(job / "store"))
            assert store._leases is not None, "the driver's ledger was not found"
            store.get_or_make("x", 1, {}, lambda attempt: attempt.json(1, "value"))
        if number == 1:
            raise ValueError("this trial fails")
        if number == 2 and not (job / "died").exists():
            (job / "died").touch()
            os._exit(1)
        if number == 3:
            mark = str(job / "trained")
            train.run("tiny", lambda arguments: open(mark, "w").close(), {}, 1, ClusterConfig())
        tune.report({"outcome": asdict(Outcome(number, {}, float(value)))})

    return trial


@pytest.mark.slow
def test_trials_on_a_cluster_end_without_leaks(small: Sweep, tmp_path: Path) -> None:
    import ray
    from ray.util import placement_group_table

    from kka_ray.cluster import leases
    from kka_ray.cluster.session import session

    four = Sweep(small.config, small.base, tuple(Trial(i, {"loop.rounds": i}, small.base) for i in range(4)))
    heard = StringIO()
    with session(small.base.cluster):
        ledger = leases.start()
        # A console, as the command line has: Tune pickles what a sweep is told.
        outcomes = run_trials(tiny(), tmp_path, four, Console(file=heard, width=1000).print)
        deadline = time.monotonic() + 30
        while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
            time.sleep(0.5)
        groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
        del ledger
        free, total = ray.available_resources()["CPU"], ray.cluster_resources()["CPU"]
    assert [o.objective for o in outcomes] == [0.0, None, 2.0, 3.0], "the one that died was tried again"
    assert "this trial fails" in (outcomes[1].error or "")
    assert (tmp_path / "trained").exists()
    assert groups == []
    assert free == total
    assert len([line for line in heard.getvalue().splitlines() if line.startswith("trial ")]) >= 4
