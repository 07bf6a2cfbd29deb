"""Cross-fitting: folds, verdicts, diagnostics, the auditor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from kka_ray.config.models import ConfusionConfig, DeepSad, FusedEvaluator, KnnEvaluator
from kka_ray.confusion import judge as judging
from kka_ray.confusion.deep_sad import DeepSadEvaluator
from kka_ray.confusion.judge import JudgeResult, fold_of, judge
from kka_ray.errors import StageError
from kka_ray.features.base import Features
from kka_ray.store import Store
from tests.confusion.clouds import DIMENSIONS, cloud

CONFIG = ConfusionConfig(evaluator=DeepSad(epochs=20, pretrain_epochs=3))
TRAIN, VALIDATION = cloud(200, 0, 0), cloud(80, 0, 1)


def drawn(count: int) -> tuple[list[str], list[int], np.ndarray, list[str]]:
    """Images of two rounds at distances 0 to 5, each description twice."""
    ids = [f"r{i % 2}-p000-s{i:03d}" for i in range(count)]
    features = np.concatenate([cloud(1, i % 6, 100 + i) for i in range(count)]) if count else np.zeros((0, DIMENSIONS))
    return ids, [i % 2 for i in range(count)], features.astype(np.float32), [f"flower {i // 2}" for i in range(count)]


def run(count: int, config: ConfusionConfig = CONFIG, seed: int = 0) -> JudgeResult:
    return judge(*drawn(count), TRAIN, VALIDATION, config, seed)


@pytest.fixture(scope="module")
def result() -> JudgeResult:
    return run(90)


def test_no_image_is_judged_by_an_evaluator_that_trained_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[set[bytes]] = []
    scored: list[tuple[set[bytes], set[bytes]]] = []
    train, score = DeepSadEvaluator.train, DeepSadEvaluator.score

    def spy_train(self: DeepSadEvaluator, anomalies: np.ndarray) -> None:
        self.seen = {row.tobytes() for row in anomalies}  # type: ignore[attr-defined]
        trained.append(self.seen)  # type: ignore[attr-defined]
        train(self, anomalies)

    def spy_score(self: DeepSadEvaluator, rows: np.ndarray) -> np.ndarray:
        scored.append((getattr(self, "seen", set()), {row.tobytes() for row in rows}))
        return score(self, rows)

    monkeypatch.setattr(DeepSadEvaluator, "train", spy_train)
    monkeypatch.setattr(DeepSadEvaluator, "score", spy_score)
    ids, _, features, _ = drawn(60)
    result = run(60)
    assert len(trained) == 3
    assert all(not (seen & rows) for seen, rows in scored)
    for fold, known in result.trained_on.items():
        rows = {features[ids.index(i)].tobytes() for i in known}
        assert rows in trained
        held_out = {v.id for v in result.verdicts if v.fold == fold}
        assert held_out
        assert held_out | set(known) == set(ids)
        assert not held_out & set(known)


def test_copies_of_a_description_share_a_fold_and_folds_stay(result: JudgeResult) -> None:
    texts = dict(zip(*[drawn(90)[k] for k in (0, 3)], strict=True))
    folds: dict[str, set[int]] = {}
    for v in result.verdicts:
        folds.setdefault(texts[v.id], set()).add(v.fold)
    assert all(len(f) == 1 for f in folds.values())
    assert fold_of("a", "A  red flower ", 3) == fold_of("b", "a red flower", 3)
    earlier = {v.id: v.fold for v in run(30).verdicts}
    later = {v.id: v.fold for v in result.verdicts}
    assert all(later[i] == fold for i, fold in earlier.items())
    assert min(Counter(fold_of(f"r0-{i}", "", 3) for i in range(300)).values()) > 70


def test_verdicts_rank_by_distance_and_labels_are_disjoint_with_a_gap(result: JudgeResult) -> None:
    assert [v.id for v in result.verdicts] == drawn(90)[0]
    hardness = np.array([v.hardness for v in result.verdicts])
    distance = np.arange(90) % 6
    assert spearmanr(hardness, distance)[0] >= 0.8
    by_label = {x: [v.hardness for v in result.verdicts if v.label == x] for x in ("normal_like", "hard", "easy")}
    assert len(by_label["easy"]) > 10
    assert max(by_label["hard"], default=-9) + CONFIG.gap <= min(by_label["easy"])
    normal = [v.label for v, d in zip(result.verdicts, distance, strict=True) if d == 0]
    assert normal.count("normal_like") >= 0.8 * len(normal)
    # Far images keep their differences: nothing saturates.
    assert len({v.hardness for v in result.verdicts}) == 90


def test_diagnostics_are_finite_and_complete(result: JudgeResult) -> None:
    d = result.diagnostics
    assert all(np.isfinite(x) for x in d.values())
    assert d["drawn"] == 90
    assert sum(d[f"fold_{k}/judged"] for k in range(3)) == 90
    assert d["auc"] > 0.7
    assert d["collapsed_folds"] == 0
    assert abs(sum(v for k, v in d.items() if k.startswith("share/")) - 1) < 1e-9


def test_latent_map_keeps_far_images_further_than_normals(result: JudgeResult) -> None:
    m = result.latent
    assert m.normals_before.shape == m.normals_after.shape == (80, 2)
    assert m.drawn_before.shape == m.drawn_after.shape == (90, 2)
    far = np.arange(90) % 6 >= 4
    for normals, images in ((m.normals_before, m.drawn_before), (m.normals_after, m.drawn_after)):
        assert np.median(np.linalg.norm(images[far], axis=1)) > 1.5 * np.median(np.linalg.norm(normals, axis=1))
    assert not np.allclose(m.drawn_before, m.drawn_after)


_FLAT = {"width": 2, "epochs": 5, "pretrain_epochs": 3}


@pytest.mark.parametrize("evaluator", [DeepSad(**_FLAT), FusedEvaluator(deep_sad=DeepSad(**_FLAT))])
def test_in_the_latent_map_a_typical_normal_has_distance_one(evaluator: DeepSad | FusedEvaluator) -> None:
    latent = run(30, CONFIG.model_copy(update={"evaluator": evaluator})).latent
    # The embedding has two dimensions, and the map shows all of it.
    assert np.median(np.linalg.norm(latent.normals_before, axis=1)) == pytest.approx(1, abs=1e-5)
    assert np.median(np.linalg.norm(latent.normals_after, axis=1)) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("rule", ["band", "paper", "nothing drawn"])
def test_comes_out_of_the_store_as_it_went_in(tmp_path: Path, rule: str) -> None:
    count = 0 if rule == "nothing drawn" else 12
    config = CONFIG.model_copy(update={"rule": "paper" if rule == "paper" else "band"})
    result = run(count, config)
    store = Store(str(tmp_path))
    store.get_or_make("judge", 1, {}, lambda attempt: judging.write_result(attempt, result))
    found = judging.read_result(store.get_or_make("judge", 1, {}, lambda attempt: pytest.fail("made again")))
    assert found.verdicts == result.verdicts
    assert found.diagnostics == result.diagnostics
    assert found.band == result.band
    assert found.trained_on == result.trained_on
    np.testing.assert_array_equal(found.validation_hardness, result.validation_hardness)
    for name in ("normals_before", "normals_after", "drawn_before", "drawn_after"):
        np.testing.assert_array_equal(getattr(found.latent, name), getattr(result.latent, name))


def test_repeats_bit_for_bit(result: JudgeResult) -> None:
    again = run(90)
    assert again.verdicts == result.verdicts
    assert again.diagnostics == result.diagnostics
    assert np.array_equal(again.latent.drawn_after, result.latent.drawn_after)
    assert run(90, seed=1).verdicts != result.verdicts


@pytest.mark.parametrize("count", [0, 1, 3])
def test_very_few_images(count: int) -> None:
    result = run(count)
    assert len(result.verdicts) == count
    assert result.diagnostics["drawn"] == count
    assert all(np.isfinite(x) for x in result.diagnostics.values())
    if count == 1:
        assert result.trained_on == {result.verdicts[0].fold: ()}


@pytest.mark.parametrize("evaluator", [DeepSad(epochs=5), KnnEvaluator(), FusedEvaluator(deep_sad=DeepSad(epochs=5))])
def test_collapse_is_reported_and_judges_nobody(evaluator) -> None:
    constant = np.full((40, DIMENSIONS), 0.2, np.float32)
    result = judge(*drawn(12), constant, constant[:10], CONFIG.model_copy(update={"evaluator": evaluator}), 0)
    assert result.diagnostics["collapsed_folds"] == len(result.trained_on)
    assert {(v.label, v.hardness) for v in result.verdicts} == {("between", 0.0)}
    assert result.sound == []


def test_a_fold_that_collapsed_has_no_say_in_the_band(monkeypatch: pytest.MonkeyPatch) -> None:
    variances = iter([0.0, 1.0, 1.0])
    monkeypatch.setattr(judging, "relative_variance", lambda *_: next(variances))
    result = run(30, CONFIG.model_copy(update={"lower_quantile": 0.7}))
    sound = result.validation_hardness.reshape(3, -1)[1:]
    assert result.band is not None
    assert result.band.lower == np.quantile(sound, 0.7)
    assert result.band.lower != np.quantile(result.validation_hardness, 0.7)
    assert {v.label for v in result.verdicts if v.fold == 0} == {"between"}
    told = [v for v in result.verdicts if v.fold != 0]
    assert result.sound == told
    assert len(told) < len(result.verdicts)
    assert result.diagnostics["median_hardness"] == np.median([v.hardness for v in told])
    assert all(v.label == result.band.label(v.hardness) for v in result.verdicts if v.fold > 0)


def test_paper_rule_in_full() -> None:
    config = CONFIG.model_copy(update={"rule": "paper", "paper_easy": 10})
    result = run(60, config)
    assert [v.label for v in result.verdicts].count("easy") == 10
    assert result.band is None
    worst = result.validation_hardness.reshape(len(result.trained_on), -1).max(axis=1)
    of_fold = dict(zip(sorted(result.trained_on), worst, strict=True))
    within = [v.hardness <= of_fold[v.fold] for v in result.verdicts if v.label != "easy"]
    assert [v.label == "hard" for v in result.verdicts if v.label != "easy"] == within
    assert any(within)


def test_rows_follow_the_input() -> None:
    features = Features(np.ones((2, 5), np.float32), pixels=np.zeros((2, 32, 32, 3), np.uint8))
    assert judging.rows(CONFIG, features) is features.pooled
    on_pixels = ConfusionConfig(evaluator=DeepSad(input="pixels"))
    assert judging.rows(on_pixels, features) is features.pixels
    with pytest.raises(ValueError, match="pixels=True"):
        judging.rows(on_pixels, Features(features.pooled))


def test_bad_input_is_refused() -> None:
    ids, rounds, features, groups = drawn(4)
    with pytest.raises(StageError, match="one row an image"):
        judge(ids, rounds[:3], features, groups, TRAIN, VALIDATION, CONFIG, 0)
    with pytest.raises(StageError, match="twice"):
        judge([ids[0], *ids[:3]], rounds, features, groups, TRAIN, VALIDATION, CONFIG, 0)
    with pytest.raises(StageError, match="validation normals"):
        judge(ids, rounds, features, groups, TRAIN, VALIDATION[:1], CONFIG, 0)


@pytest.mark.parametrize(("real", "drawn_count"), [(40, 41), (6, 60), (100, 10)])
def test_of_the_normals_that_set_the_scale_half_are_real(real: int, drawn_count: int) -> None:
    own, drawn_normals = cloud(real, 2, 6), cloud(drawn_count, 3, 7)
    _, validation = judging.with_drawn_normals(TRAIN, own, drawn_normals)
    for kind in (own, drawn_normals[1::2]):
        counts = Counter(r.tobytes() for r in validation)
        times = [counts[r.tobytes()] for r in kind]
        assert sum(times) == len(validation) // 2
        assert max(times) - min(times) <= 1, "all of a kind count, and all alike"


def test_drawn_normals_that_are_learnt_are_a_fifth_of_the_real_ones_or_more_and_never_outnumber_them() -> None:
    drawn_normals = cloud(41, 3, 7)
    train, _ = judging.with_drawn_normals(TRAIN, VALIDATION, drawn_normals)
    learned = drawn_normals[::2]
    assert np.array_equal(train[: len(TRAIN)], TRAIN)
    assert len(train) - len(TRAIN) == 2 * len(learned), "a fifth of 200 real ones"
    assert {r.tobytes() for r in train[len(TRAIN) :]} == {r.tobytes() for r in learned}
    few, _ = judging.with_drawn_normals(TRAIN[:8], VALIDATION, drawn_normals)
    assert np.array_equal(few, np.concatenate([TRAIN[:8], learned[:8]]))


def test_with_drawn_normals_what_is_merely_drawn_is_not_easy() -> None:
    """Everything drawn lies off the photographs by the same step; the anomalies lie beyond it."""
    step = np.zeros(DIMENSIONS, np.float32)
    step[-1] = 12
    ids, rounds, features, groups = drawn(90)
    pretending = [cloud(1, 0, 900 + i)[0] + step for i in range(30)]
    everything = np.concatenate([features + step, pretending]).astype(np.float32)
    names = [f"r0-p001-s{i:03d}" for i in range(30)]
    arguments = ([*ids, *names], [*rounds, *[0] * 30], everything, [*groups, *names])

    def easy(train: np.ndarray, validation: np.ndarray) -> int:
        verdicts = judge(*arguments, train, validation, CONFIG, 0).verdicts
        return sum(v.label == "easy" for v in verdicts if v.id in names)

    with_drawn = judging.with_drawn_normals(TRAIN, VALIDATION, cloud(60, 0, 8) + step)
    assert easy(TRAIN, VALIDATION) > 20
    assert easy(*with_drawn) < 10
