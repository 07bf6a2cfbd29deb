"""Cross-fitted verdicts: no image is judged by an evaluator that trained on it.

The drawn images are dealt into folds by a hash of their description, so that an image's fold never changes, whatever
is drawn later, and copies of a description share a fold. For each fold an evaluator trains on the training normals
and on the drawn images of the *other* folds, and judges its own. Validation normals, which no evaluator trains on, set
the scale of each fold and the edges of the band.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np
from sklearn.metrics import roc_auc_score

from kka_ray.config.models import ConfusionConfig, DeepSad, FusedEvaluator, KnnEvaluator
from kka_ray.confusion.base import COLLAPSED, Evaluator, relative_variance
from kka_ray.confusion.deep_sad import DeepSadEvaluator
from kka_ray.confusion.fused import Fused
from kka_ray.confusion.hardness import Band, Label, Scale, paper_labels
from kka_ray.confusion.knn import Knn
from kka_ray.errors import StageError
from kka_ray.features.base import Features
from kka_ray.records import Verdict, from_table, to_table
from kka_ray.store import Attempt, Output

VERSION = 6


@dataclass(frozen=True)
class LatentMap:
    """Where images lie about the centre, float32 (N, 2) each: the centre is (0, 0), a typical normal has distance 1.

    The two axes are principal axes of the embeddings shown. Distances in the plane are at most those in the embedding.
    `before`: the pretrained encoder; `after`: each drawn image by the evaluator that judged it, the validation normals
    shared out among the folds. Axes of `before` and `after` are not the same.
    """

    normals_before: np.ndarray
    normals_after: np.ndarray
    drawn_before: np.ndarray
    drawn_after: np.ndarray


@dataclass(frozen=True)
class JudgeResult:
    """Verdicts in the order of the ids given, and what there is to say of the evaluators.

    diagnostics, all finite: for each fold `k` that judged something, `fold_k/` with `judged`, `trained_on` (drawn
    images), `relative_variance` of the validation normals' embeddings, `collapsed` (0 or 1) and `auc` of the validation
    normals against the held-out drawn images; over all, `drawn` (images), `collapsed_folds`, mean `auc`,
    `median_hardness` (of the `sound` verdicts; 0 without), the shares `share/LABEL`, and with a band its `band_lower`,
    `band_upper`, `band_easy` and `band_empty` (0 or 1). With no images there is `drawn` = 0 alone.
    trained_on: for each fold that judged something, the ids of the drawn images that its evaluator trained on.
    band: None with rule `paper` and with no images.
    """

    verdicts: list[Verdict]
    diagnostics: dict[str, float]
    band: Band | None
    latent: LatentMap
    trained_on: dict[int, tuple[str, ...]] = field(default_factory=dict)
    validation_hardness: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Hardness of the validation normals under each fold's evaluator, float64 (folds x validation normals,)."""

    @property
    def sound(self) -> list[Verdict]:
        """The verdicts of evaluators that did not collapse: the hardness in the others says nothing."""
        return [v for v in self.verdicts if not self.diagnostics.get(f"fold_{v.fold}/collapsed")]


def write_result(attempt: Attempt, result: JudgeResult) -> None:
    """Writes a result into an output of the store."""
    attempt.table(to_table(Verdict, result.verdicts))
    attempt.json(
        {
            "diagnostics": result.diagnostics,
            "band": asdict(result.band) if result.band else None,
            "trained_on": {str(fold): list(ids) for fold, ids in result.trained_on.items()},
        },
        "result",
    )
    for name, array in {**asdict(result.latent), "validation_hardness": result.validation_hardness}.items():
        attempt.array(array, name)


def read_result(output: Output) -> JudgeResult:
    """The inverse of `write_result`."""
    values = output.json("result")
    return JudgeResult(
        from_table(Verdict, output.table()),
        values["diagnostics"],
        Band(**values["band"]) if values["band"] else None,
        LatentMap(**{field.name: output.array(field.name) for field in fields(LatentMap)}),
        {int(fold): tuple(ids) for fold, ids in values["trained_on"].items()},
        output.array("validation_hardness"),
    )


@dataclass(frozen=True)
class _Fold:
    """One fold judged: its held-out rows with their hardness and embeddings, and its validation normals."""

    number: int
    rows: np.ndarray
    scores: np.ndarray
    hardness: np.ndarray
    validation_hardness: np.ndarray
    drawn_points: np.ndarray
    normal_points: np.ndarray
    relative_variance: float
    auc: float

    @property
    def collapsed(self) -> bool:
        return self.relative_variance <= COLLAPSED


def make_evaluator(config: DeepSad | KnnEvaluator | FusedEvaluator) -> Evaluator:
    """The evaluator of a configuration, not fitted."""
    match config:
        case DeepSad():
            return DeepSadEvaluator(config)
        case KnnEvaluator():
            return Knn(config)
        case FusedEvaluator():
            return Fused(config)


def rows(config: ConfusionConfig, features: Features) -> np.ndarray:
    """What the configured evaluator reads of images: their pooled features, or their pixels.

    Raises ValueError if it reads pixels and the features come without them.
    """
    if not (isinstance(config.evaluator, DeepSad) and config.evaluator.input == "pixels"):
        return features.pooled
    return features.need_pixels("the evaluator")


def fold_of(id_: str, text: str, folds: int) -> int:
    """The fold of a drawn image: a hash of its description, case and spaces aside, or of its id if that is empty."""
    words = " ".join(text.lower().split())
    return int.from_bytes(hashlib.sha256((words or id_).encode()).digest()[:8], "big") % folds


def with_drawn_normals(train: np.ndarray, validation: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation normals with drawn normals (at least 4 rows) among them; all are what `rows` makes.

    An evaluator that knows photographs alone as normal learns "drawn" for "anomalous", and every image is easy. Every
    other drawn normal joins the training normals: no more than there are of these, which would be outnumbered, and
    repeated up to a fifth of them, so that a few count with an evaluator that learns (to k-NN they are one neighbour
    each). The others join the validation normals, and together these set the scale and the band: whichever are fewer
    are repeated, so that either kind counts half.
    """
    learned, held_out = drawn[::2][: len(train)], drawn[1::2]
    learned = np.concatenate([learned] * max(1, round(len(train) / 5 / len(learned))))
    count = max(len(validation), len(held_out))
    halves = [x[np.arange(count) % len(x)] for x in (validation, held_out)]
    return np.concatenate([train, learned]), np.concatenate(halves)


def judge(
    ids: Sequence[str],
    rounds: Sequence[int],
    features: np.ndarray,
    groups: Sequence[str],
    train_normals: np.ndarray,
    validation_normals: np.ndarray,
    config: ConfusionConfig,
    seed: int,
) -> JudgeResult:
    """Judges drawn images.

    `ids`, `rounds`, `features` and `groups` (the description texts) go row by row. `features` and both sets of normals
    are what `rows` makes. A fold without drawn images to train on, as with one image, has a one-class evaluator (Deep
    SVDD); no images give no verdicts. Images of a fold whose evaluator collapsed get hardness 0 and the label
    `between`, which neither prefers nor rejects them; `diagnostics` report it.

    Deterministic given the seed and the thread count. Raises StageError if lengths differ, ids repeat, or there are
    fewer than two normals in a set.
    """
    _check(ids, rounds, features, groups, validation_normals)
    if not ids:
        none = np.zeros((0, 2), np.float32)
        return JudgeResult([], {"drawn": 0.0}, None, LatentMap(none, none, none, none))
    assigned = np.array([fold_of(i, text, config.folds) for i, text in zip(ids, groups, strict=True)])
    pretrained = make_evaluator(config.evaluator)
    pretrained.pretrain(train_normals, seed)
    used = sorted(set(assigned.tolist()))
    folds = [_judge_fold(pretrained, k, assigned, features, validation_normals) for k in used]
    labels, band = _labels(folds, ids, config)
    verdicts: list[Verdict | None] = [None] * len(ids)
    for fold in folds:
        for i, score, hardness in zip(fold.rows, fold.scores, fold.hardness, strict=True):
            verdicts[i] = Verdict(ids[i], rounds[i], fold.number, float(score), float(hardness), labels[i])
    done = [v for v in verdicts if v is not None]
    trained_on = {k: tuple(ids[i] for i in np.flatnonzero(assigned != k).tolist()) for k in used}
    latent = _latent_map(pretrained, folds, features, validation_normals)
    validation = np.concatenate([f.validation_hardness for f in folds])
    return JudgeResult(done, _diagnostics(folds, done, band, trained_on), band, latent, trained_on, validation)


def _check(
    ids: Sequence[str], rounds: Sequence[int], features: np.ndarray, groups: Sequence[str], validation: np.ndarray
) -> None:
    lengths = {"ids": len(ids), "rounds": len(rounds), "features": len(features), "groups": len(groups)}
    if len(set(lengths.values())) > 1:
        raise StageError(f"the judge needs one row an image, got {lengths}")
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if list(ids).count(i) > 1})[:3]
        raise StageError(f"the judge was given ids twice: {', '.join(twice)}, ...; give each drawn image once")
    if len(validation) < 2:
        raise StageError(f"the judge needs at least 2 validation normals, got {len(validation)}: raise data.validation")


def _judge_fold(
    pretrained: Evaluator, number: int, assigned: np.ndarray, features: np.ndarray, validation: np.ndarray
) -> _Fold:
    evaluator = copy.deepcopy(pretrained)
    evaluator.train(features[assigned != number])
    held_out = np.flatnonzero(assigned == number)
    scores, validation_scores = evaluator.score(features[held_out]), evaluator.score(validation)
    normals = evaluator.embed(validation)
    scale = Scale.of(validation_scores)
    variance = relative_variance(normals, evaluator.centre)
    hardness = scale.hardness(scores)
    points = normals - evaluator.centre
    unit = _unit(points)
    return _Fold(
        number,
        held_out,
        scores,
        np.zeros_like(hardness) if variance <= COLLAPSED else hardness,
        scale.hardness(validation_scores),
        (evaluator.embed(features[held_out]) - evaluator.centre) / unit,
        points / unit,
        variance,
        _auc(validation_scores, scores),
    )


def _auc(normals: np.ndarray, drawn: np.ndarray) -> float:
    truth = np.r_[np.zeros(len(normals)), np.ones(len(drawn))]
    return float(roc_auc_score(truth, np.r_[normals, drawn]))


def _labels(folds: Sequence[_Fold], ids: Sequence[str], config: ConfusionConfig) -> tuple[list[Label], Band | None]:
    hardness, worst = np.zeros(len(ids)), np.zeros(len(ids))
    for fold in folds:
        hardness[fold.rows], worst[fold.rows] = fold.hardness, fold.validation_hardness.max()
    band = None
    if config.rule == "paper":
        labels = paper_labels(hardness, worst, config.paper_easy, ids)
    else:
        # A collapsed fold's scale says nothing of where normals end, unless there is no other.
        sound = [f for f in folds if not f.collapsed] or folds
        band = Band.of(np.concatenate([f.validation_hardness for f in sound]), config)
        labels = [band.label(h) for h in hardness]
    for fold in folds:
        if fold.collapsed:
            for i in fold.rows:
                labels[i] = "between"
    return labels, band


def _diagnostics(
    folds: Sequence[_Fold], verdicts: Sequence[Verdict], band: Band | None, trained_on: dict[int, tuple[str, ...]]
) -> dict[str, float]:
    out: dict[str, float] = {"drawn": float(len(verdicts))}
    for fold in folds:
        name = f"fold_{fold.number}"
        out[f"{name}/judged"] = float(len(fold.rows))
        out[f"{name}/trained_on"] = float(len(trained_on[fold.number]))
        out[f"{name}/relative_variance"] = fold.relative_variance
        out[f"{name}/collapsed"] = float(fold.collapsed)
        out[f"{name}/auc"] = fold.auc
    out["collapsed_folds"] = float(sum(f.collapsed for f in folds))
    out["auc"] = float(np.mean([f.auc for f in folds]))
    collapsed = {f.number for f in folds if f.collapsed}
    told = [v.hardness for v in verdicts if v.fold not in collapsed]
    out["median_hardness"] = float(np.median(told)) if told else 0.0
    for label in ("normal_like", "hard", "between", "easy"):
        out[f"share/{label}"] = sum(v.label == label for v in verdicts) / len(verdicts)
    if band is not None:
        out |= {"band_lower": band.lower, "band_upper": band.upper, "band_easy": band.easy}
        out["band_empty"] = float(band.is_empty)
    return out


def _latent_map(
    pretrained: Evaluator, folds: Sequence[_Fold], features: np.ndarray, validation: np.ndarray
) -> LatentMap:
    normals = pretrained.embed(validation) - pretrained.centre
    unit = _unit(normals)
    normals = normals / unit
    drawn = (pretrained.embed(features) - pretrained.centre) / unit
    normals_before, drawn_before = _plane(normals, drawn)
    for place, fold in enumerate(folds):
        normals[place :: len(folds)] = fold.normal_points[place :: len(folds)]
        drawn[fold.rows] = fold.drawn_points
    normals_after, drawn_after = _plane(normals, drawn)
    return LatentMap(normals_before, normals_after, drawn_before, drawn_after)


def _unit(points: np.ndarray) -> float:
    """Distance of a typical normal from the centre, of points (N, D) about it; not 0 where all lie in it."""
    return max(float(np.median(np.linalg.norm(points, axis=1))), 1e-12)


def _plane(normals: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets on the two axes of largest power about the origin."""
    points = np.concatenate([normals, drawn]).astype(np.float64)
    _, axes = np.linalg.eigh(points.T @ points)
    flat = (points @ axes[:, :-3:-1]).astype(np.float32)
    return flat[: len(normals)], flat[len(normals) :]
