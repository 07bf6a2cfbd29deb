import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kka_ray import evaluation
from kka_ray.cluster.streaming import Drawn
from kka_ray.config.models import AnomalyWeights, BackboneConfig, DetectConfig, FlowersData, Knn, LinearHead, RunConfig
from kka_ray.detectors import sources
from kka_ray.detectors.tuned import VERSION as FIT_VERSION
from kka_ray.errors import StageError, StoreError
from kka_ray.evaluation import (
    TRAINED,
    Evaluation,
    fit_headline,
    headline_detector,
    metrics,
    normal_views,
    review,
    spread,
    unseen_drawn_normals,
    verdict_weights,
)
from kka_ray.features.base import Features
from kka_ray.loop import LoopResult
from kka_ray.prepare import bare
from kka_ray.records import Verdict
from kka_ray.store import Store, stage_key
from tests.drawn import drawn_of


def test_images_weigh_by_their_last_verdict_and_alike_by_default() -> None:
    verdicts = {
        id_: Verdict(id_, 0, 0, 1.0, 1.0, label)
        for id_, label in (("a", "hard"), ("b", "easy"), ("c", "between"), ("d", "hard"))
    }
    assert verdict_weights(AnomalyWeights(), list(verdicts), verdicts) is None
    assert verdict_weights(AnomalyWeights(hard=3, easy=0.5), ["d", "b", "c", "a"], verdicts) == (3, 0.5, 1, 3)
    assert verdict_weights(AnomalyWeights(hard=3), ["a", "d"], verdicts) is None, "only ratios matter"


def test_the_control_of_artefacts_is_not_measured_on_what_the_detector_learned() -> None:
    pooled = np.arange(5, dtype=np.float32)[:, None]
    result = LoopResult([], normals=Drawn(ids=list("abcde"), features=Features(pooled)))

    def unseen(learned: bool) -> list[float]:
        detect = DetectConfig(drawn_normals=learned)
        config = RunConfig(name="x", data=FlowersData(kind="flowers"), detect=detect)
        return unseen_drawn_normals(config, result).pooled[:, 0].tolist()

    assert unseen(False) == [0, 1, 2, 3, 4]
    assert unseen(True) == [1, 3]


def test_a_headline_that_needs_anomalies_and_has_none_is_an_error_that_says_so() -> None:
    detect = DetectConfig(detectors=(Knn(kind="knn"), LinearHead(kind="fused")), headline="fused")
    config = RunConfig(name="x", data=FlowersData(kind="flowers"), detect=detect)
    fits = {("knn", "baseline", 0): "k"}
    with pytest.raises(StageError, match=r"kept no image and the detector fused needs anomalies; raise loop\.lines"):
        headline_detector(config, None, None, Evaluation([], fits, [], 0, 0))  # type: ignore[arg-type]


def test_the_detector_that_is_served_has_kkas_set_where_one_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_fit_output", lambda store, key: SimpleNamespace(local=Path(key)))
    monkeypatch.setattr(evaluation.TunedDetector, "load", lambda folder, backbone: folder.parent.name)
    detect = DetectConfig(detectors=(Knn(kind="knn"), LinearHead(kind="fused")), headline="fused")
    config = RunConfig(name="x", data=FlowersData(kind="flowers"), detect=detect)
    every = {(d, arm, s): f"{d} {arm} {s}" for d in ("knn", "fused") for arm in ("baseline", "kka") for s in (0, 1)}
    without = {key: value for key, value in every.items() if key[1] != "kka"}
    prepared: Any = SimpleNamespace(backbone=None)
    for fits, wanted in ((every, "fused kka 0"), (without, "fused baseline 0")):
        assert headline_detector(config, None, prepared, Evaluation([], fits, [], 0, 0)) == wanted  # type: ignore[arg-type,comparison-overlap]


def test_what_is_to_be_reviewed_is_the_most_anomalous_first() -> None:
    assert review(np.array([0.1, 0.9, 0.3, 0.9, -1.0]), 3) == [1, 3, 2]


def test_fits_are_counted_as_they_come_into_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_LOOK_SECONDS", 0.02)
    store, heard = Store(str(tmp_path)), []
    keys = [stage_key("fit", 1, {"n": n}) for n in range(3)]
    with evaluation._counting(store, [*keys, keys[0]], heard.append):  # one that two arms share
        for n in range(2):
            store.get_or_make("fit", 1, {"n": n}, lambda attempt: attempt.write("data", b"0"))
        deadline = time.monotonic() + 10
        while 3 not in heard and time.monotonic() < deadline:
            time.sleep(0.02)
    assert heard[-1] == 3
    assert set(heard) <= {0, 2, 3}
    assert not [thread for thread in threading.enumerate() if thread.name == "kka-fits"]


def test_measures_are_those_of_scores_worked_by_hand() -> None:
    anomalous = np.array([False, False, False, True, True])
    found = metrics(np.array([1.0, 2.0, 3.0, 2.0, 4.0]), anomalous)
    # Six pairs: 2 against 1, 2 (a tie) and 3, 4 against all.
    assert found["auc"] == pytest.approx((1 + 0.5 + 0 + 3) / 6)
    # Down the scores: 4 (an anomaly), 3 (a normal), then 2 twice: one of four, of which two are anomalies.
    assert found["aupr"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)
    assert found["fpr95"] == pytest.approx(2 / 3), "both anomalies are found at a threshold of 2"
    assert metrics(-np.arange(5.0), anomalous)["auc"] == 0
    # Ties of a normal and an anomaly each: 19 of 20 anomalies are found beside 19 of 20 normals.
    pairs = metrics(np.repeat(np.arange(20.0), 2), np.tile([False, True], 20))
    assert pairs["fpr95"] == pytest.approx(0.95)


def test_equal_figures_have_no_spread() -> None:
    assert spread([0.8871416666666667] * 3)["std"] == 0, "the rounding of their mean is none"
    assert spread([0.5])["std"] == 0
    assert spread([0.4, 0.6])["std"] == pytest.approx(0.02**0.5)


def test_views_of_normals_are_as_many_as_those_of_anomalies() -> None:
    normals = [np.full((8, 8, 3), shade, np.uint8) for shade in range(0, 250, 10)]
    config = RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}, "detect": {"views": 4}})
    for anomalies in (0, 3, 7, 13):
        shown = normal_views(config, normals, anomalies)
        assert len(shown) == 4 * anomalies
        spread_over = {round(image.mean() / 10) for image in shown}
        assert len(spread_over) >= min(len(shown), 20) - 8


def test_every_arm_is_fitted_to_what_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real stages of features, in a store; the job of the fits only says what it was asked for."""
    asked: list[dict[str, Any]] = []
    validation: set[str] = set()

    def run(name: str, function: Any, arguments: dict[str, Any], *_: Any, **__: Any) -> None:
        asked.extend(arguments["fits"])
        validation.add(arguments["validation"])

    monkeypatch.setattr(evaluation.train, "run", run)
    store = Store(str(tmp_path))

    def features(seed: int, count: int) -> Features:
        return Features(np.random.default_rng(seed).random((count, 3)).astype(np.float32))

    def images(seed: int, count: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(count)]

    class FakeBackbone:
        config, identity = BackboneConfig(), "fake"

        def extract(self, shown: Sequence[np.ndarray], patches: bool) -> Features:
            return Features(np.stack([image.mean((0, 1)) for image in shown]).astype(np.float32))

    train_set, held_out = bare(images(0, 20)), bare(images(1, 5))
    prepared = SimpleNamespace(
        normals=SimpleNamespace(train=train_set, validation=held_out),
        backbone=FakeBackbone(),
        patches=False,
        train=FakeBackbone().extract(train_set.images, False),
    )

    def played(number: int, kept: Sequence[str]) -> Any:
        ids = [f"r{number}-{i}" for i in range(4)]
        part = drawn_of(ids, images(10 + number, 4), features(10 + number, 4))
        return SimpleNamespace(drawn=part, kept=[SimpleNamespace(id=id_) for id_ in kept])

    rounds = [played(0, ["r0-0", "r0-1", "r0-2"]), played(1, ["r0-1", "r1-2", "r1-3"])]
    own = drawn_of([f"n{i}" for i in range(5)], images(20, 5), features(20, 5))
    verdicts = {id_: SimpleNamespace(label="hard" if id_ == "r1-2" else "easy") for r in rounds for id_ in r.drawn.ids}
    loop = LoopResult([], normals=own, verdicts=verdicts)  # type: ignore[arg-type]
    loop.rounds = rounds
    config = RunConfig.model_validate(
        {
            "name": "x",
            "data": {"kind": "flowers"},
            "detect": {
                "detectors": [{"kind": "fused"}, {"kind": "knn"}],
                "headline": "fused",
                "seeds": 2,
                "drawn_normals": True,
                "controls": ["noise", "drawn_normals"],
                "weights": {"hard": 3},
            },
        }
    )
    arms = evaluation._arms(config, store, prepared, loop)  # type: ignore[arg-type]
    evaluation._fit_all(config, store, prepared, loop, arms, lambda done: None)  # type: ignore[arg-type]

    def held(key: str) -> np.ndarray:
        output = store.find("features", key)
        assert output is not None
        found = output.array("pooled")
        assert found is not None
        return found

    by_arm: dict[str, dict[str, Any]] = {}
    for fit in asked:
        if fit["detector"].kind == "fused":
            by_arm.setdefault(next(a.name for a in arms if a.features == fit["anomalies"]), fit)
    assert sorted(by_arm) == ["drawn_normals", "kka", "noise", "zeroth"]
    first, last = loop.features(["r0-0", "r0-1", "r0-2"]).pooled, loop.features(["r0-1", "r1-2", "r1-3"]).pooled
    np.testing.assert_array_equal(held(by_arm["zeroth"]["anomalies"]), first)
    np.testing.assert_array_equal(held(by_arm["kka"]["anomalies"]), last)
    np.testing.assert_array_equal(held(by_arm["drawn_normals"]["anomalies"]), own.features.pooled[:3])
    noise = sources.make("noise", train_set.images, 3, config.seed)
    np.testing.assert_array_equal(held(by_arm["noise"]["anomalies"]), FakeBackbone().extract(noise, False).pooled)
    # Drawn normals train beside the real ones, but for the arm that has them for anomalies.
    both = np.concatenate([prepared.train.pooled, own.features.pooled[TRAINED]])
    for name in ("zeroth", "kka", "noise"):
        np.testing.assert_array_equal(held(by_arm[name]["train"]), both)
    np.testing.assert_array_equal(held(by_arm["drawn_normals"]["train"]), prepared.train.pooled)
    (calibrated_on,) = validation
    np.testing.assert_array_equal(held(calibrated_on), FakeBackbone().extract(held_out.images, False).pooled)
    assert by_arm["kka"]["weights"] == (1, 3, 1)
    assert by_arm["zeroth"]["weights"] is None
    kinds = [(fit["detector"].kind, fit["anomalies"] is None) for fit in asked]
    assert kinds.count(("knn", True)) == 2, "k-NN ignores anomalies, the head needs them"
    assert kinds.count(("fused", False)) == 2 * 4
    assert len(kinds) == 10

    monkeypatch.setattr("kka_ray.store._SEEN_WITHIN", 0)
    # The headline alone, as trials are measured with it, is fitted with the last set and not the first.
    asked.clear()
    alone = config.model_copy(update={"seed": 7})
    with pytest.raises(StoreError, match="made by another process"):
        fit_headline(alone, store, prepared, loop)  # type: ignore[arg-type]
    assert [(fit["detector"].kind, fit["anomalies"]) for fit in asked] == [("fused", by_arm["kka"]["anomalies"])] * 2
    assert len({fit["seed"] for fit in asked}) == 2

    # Without a round of DPO the last set is the zero-th: two arms, and each fit is done once.
    loop.rounds = rounds[:1]
    asked.clear()
    arms = evaluation._arms(config, store, prepared, loop)  # type: ignore[arg-type]
    fits = evaluation._fit_all(config, store, prepared, loop, arms, lambda done: None)  # type: ignore[arg-type]
    assert all(fits["fused", "zeroth", seed] == fits["fused", "kka", seed] for seed in range(2))
    keys = [stage_key("fit", FIT_VERSION, fit["inputs"]) for fit in asked]
    assert sorted(keys) == sorted(set(fits.values()))
    assert len(keys) == len(fits) - 2

    # The views of normals alone are a control, of those detectors that read them beside anomalies.
    asked.clear()
    detect = {"detectors": [{"kind": "deep_sad"}, {"kind": "knn"}, {"kind": "fused"}], "headline": "deep_sad"}
    detect |= {"seeds": 1, "views": 2, "controls": ["normal_views"]}
    viewed = RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}, "detect": detect})
    arms = evaluation._arms(viewed, store, prepared, loop)  # type: ignore[arg-type]
    assert [(arm.name, arm.count) for arm in arms][-1] == ("normal_views", 0)
    fits = evaluation._fit_all(viewed, store, prepared, loop, arms, lambda done: None)  # type: ignore[arg-type]
    assert [detector for detector, arm, _ in fits if arm == "normal_views"] == ["deep_sad"]
    (alone_with_views,) = [fit for fit in asked if fit["anomalies"] is None and fit["views"]]
    of_normals, of_anomalies = alone_with_views["views"]
    assert len(held(of_normals)) == 2 * 3
    assert of_anomalies is None
