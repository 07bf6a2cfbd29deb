"""What the anomaly set is worth: detectors without it, with the zero-th set, with KKA's, and with sets made without a
language model, over several seeds. Test images are opened here and nowhere else."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from kka_ray import versions
from kka_ray.cluster import train
from kka_ray.cluster.fits import fit_worker
from kka_ray.cluster.streaming import Progress
from kka_ray.config.models import AnomalyWeights, Detector, RunConfig
from kka_ray.data.base import ImageSet
from kka_ray.detectors import build, outside, sources
from kka_ray.detectors.tuned import CALIBRATION, TunedDetector
from kka_ray.detectors.tuned import VERSION as FIT_VERSION
from kka_ray.errors import StageError
from kka_ray.features import views
from kka_ray.features.base import Features
from kka_ray.features.cache import write_features
from kka_ray.loop import LoopResult
from kka_ray.prepare import (
    FEATURES_VERSION,
    Prepared,
    bare,
    extract,
    extract_output,
    feature_inputs,
    test_set,
)
from kka_ray.records import Verdict
from kka_ray.store import Output, Store, stage_key

BASELINE, ZEROTH, KKA = "baseline", "zeroth", "kka"
VIEWED = "normal_views"
"""The control without anomalies: normals and the views of them that go with the anomalies of other arms."""

TRAINED, UNSEEN = slice(0, None, 2), slice(1, None, 2)
"""Of the drawn normals: those that train detectors where `detect.drawn_normals` asks, and those that never do."""
_LOOK_SECONDS = 3.0


@dataclass(frozen=True)
class Arm:
    """An anomaly set to train with.

    features, views: keys of the features of its images and of their views. weights: of its images, None for all alike.
    """

    name: str
    count: int
    features: str | None
    views: str | None = None
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Row:
    """One detector, fitted with one arm and one seed, on the test images; all measures in 0..1."""

    detector: str
    arm: str
    count: int
    seed: int
    auc: float
    aupr: float
    fpr95: float
    fit_seconds: float
    fit: str
    """Key in stage `fit`."""


@dataclass(frozen=True)
class Evaluation:
    """All rows, none where the data has no test anomalies, and the fits behind them."""

    rows: list[Row]
    fits: dict[tuple[str, str, int], str]
    """Key in stage `fit` by (detector, arm, seed)."""
    arms: list[Arm]
    test_normals: int
    test_anomalies: int

    def summary(self, detector: str, arm: str) -> dict[str, Any] | None:
        """Mean, standard deviation over fits to the same images, and each seed's AUC; None if it was not run."""
        values = [r.auc for r in self.rows if r.detector == detector and r.arm == arm]
        return spread(values) if values else None

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as JSON values."""
        return [asdict(r) for r in self.rows]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation of the sample (0 for one value, or equal ones) and the values themselves."""
    std = float(np.std(values, ddof=1)) if len(set(values)) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": std, "per_seed": [float(v) for v in values]}


def metrics(scores: np.ndarray, anomalous: np.ndarray) -> dict[str, float]:
    """AUC, average precision and the false-positive rate at 95 % true positives; anomalies are the positive class."""
    false_positives, true_positives, _ = roc_curve(anomalous, scores, drop_intermediate=False)
    return {
        "auc": float(roc_auc_score(anomalous, scores)),
        "aupr": float(average_precision_score(anomalous, scores)),
        "fpr95": float(false_positives[np.searchsorted(true_positives, 0.95)]),
    }


def evaluate(
    config: RunConfig,
    store: Store,
    prepared: Prepared,
    loop: LoopResult,
    progress: Progress,
    ahead: Callable[[], train.Ahead | None] = lambda: None,
) -> Evaluation:
    """Fits every detector with every arm, then, at the very end, scores the test images.

    `ahead` gives the job of the fits, if it was started before and is needed.
    """
    arms = _arms(config, store, prepared, loop)
    wanted = sum(_takes_arm(d, a) for d in config.detect.detectors for a in arms) * config.detect.seeds
    progress("detect", -1, 0, wanted)
    fits = _fit_all(config, store, prepared, loop, arms, lambda done: progress("detect", -1, done, wanted), ahead)
    progress("detect", -1, wanted, wanted)
    test = test_set(config, prepared.data, store)
    if test is None:
        return Evaluation([], fits, arms, 0, 0)
    progress("evaluate", -1, 0, len(fits))
    features = extract(store, prepared.backbone, test, prepared.patches)
    counts = {arm.name: arm.count for arm in arms}
    rows = []
    for number, ((detector, arm, seed), key) in enumerate(fits.items(), 1):
        output = _fit_output(store, key)
        scores = TunedDetector.load(output.local / "detector", prepared.backbone).score(features).score
        progress("evaluate", -1, number, len(fits))
        measured = metrics(scores, test.anomalous)
        seconds = output.json("fit")["fit_seconds"]
        rows.append(Row(detector, arm, counts[arm], seed, **measured, fit_seconds=seconds, fit=key))
    return Evaluation(rows, fits, arms, int((~test.anomalous).sum()), int(test.anomalous.sum()))


def fit_headline(config: RunConfig, store: Store, prepared: Prepared, loop: LoopResult) -> list[TunedDetector]:
    """The headline detector alone, fitted with the loop's last kept set: one a seed.

    Opens no test file. Without kept images it is fitted to normals alone. Raises StageError if the detector cannot do
    that.
    """
    headline = tuple(d for d in config.detect.detectors if d.kind == config.detect.headline)
    alone = config.model_copy(update={"detect": config.detect.model_copy(update={"detectors": headline})})
    ids = [k.id for k in loop.rounds[-1].kept]
    arm = _drawn_arm(config, store, prepared, loop, KKA, ids) if ids else Arm(BASELINE, 0, None)
    keys = _fit_all(alone, store, prepared, loop, [arm], lambda done: None).values()
    if not keys:
        raise _nothing_kept(config.detect.headline)
    return [TunedDetector.load(_fit_output(store, k).local / "detector", prepared.backbone) for k in keys]


def headline_detector(config: RunConfig, store: Store, prepared: Prepared, evaluation: Evaluation) -> TunedDetector:
    """The detector that is served: the headline one with KKA's set, of the first seed.

    Without kept images it is the one fitted to normals alone. Raises StageError if the detector cannot do that.
    """
    headline, fits = config.detect.headline, evaluation.fits
    key = fits.get((headline, KKA, 0)) or fits.get((headline, BASELINE, 0))
    if key is None:
        raise _nothing_kept(headline)
    return TunedDetector.load(_fit_output(store, key).local / "detector", prepared.backbone)


def _nothing_kept(detector: str) -> StageError:
    return StageError(
        f"the loop kept no image and the detector {detector} needs anomalies; raise loop.lines, or confusion.upper for "
        "a wider hard band"
    )


def _arms(config: RunConfig, store: Store, prepared: Prepared, loop: LoopResult) -> list[Arm]:
    zeroth = [k.id for k in loop.rounds[0].kept]
    kept = [k.id for k in loop.rounds[-1].kept]
    arms = [Arm(BASELINE, 0, None)]
    for name, ids in ((ZEROTH, zeroth), (KKA, kept)):
        if ids:
            arms.append(_drawn_arm(config, store, prepared, loop, name, ids))
    for kind in config.detect.controls if kept else ():
        if kind == VIEWED:
            arms.append(Arm(VIEWED, 0, None))
        elif kind != "drawn_normals":
            images = _control_images(config, prepared, kind, len(kept))
            arms.append(_arm(config, store, prepared, kind, images, _extracted(store, prepared, bare(images))))
        elif loop.normals.ids:
            ids = loop.normals.ids[: len(kept)]
            key = _put(store, prepared, loop.normals.features.take(range(len(ids))), ids)
            arms.append(_arm(config, store, prepared, kind, loop.normals.images(ids), key))
    return arms


def _control_images(config: RunConfig, prepared: Prepared, kind: str, count: int) -> list[np.ndarray]:
    if kind == "outside":
        assert config.detect.outside is not None
        return outside.draw(config.detect.outside, count, config.seed)
    return sources.make(kind, prepared.normals.train.images, count, config.seed)


def _drawn_arm(config: RunConfig, store: Store, prepared: Prepared, loop: LoopResult, name: str, ids: list[str]) -> Arm:
    key = _put(store, prepared, loop.features(ids), ids)
    arm = _arm(config, store, prepared, name, loop.images(ids), key)
    return replace(arm, weights=verdict_weights(config.detect.weights, ids, loop.verdicts))


def verdict_weights(
    weights: AnomalyWeights, ids: Sequence[str], verdicts: Mapping[str, Verdict]
) -> tuple[float, ...] | None:
    """The weight of each drawn image by its last verdict; None if all weigh the same."""
    each = tuple(float(getattr(weights, verdicts[id_].label)) for id_ in ids)
    return each if len(set(each)) > 1 else None


def _arm(
    config: RunConfig,
    store: Store,
    prepared: Prepared,
    name: str,
    images: Sequence[np.ndarray],
    features: str,
) -> Arm:
    shown = views.views(images, config.detect.views, config.seed)
    return Arm(name, len(images), features, _put_views(store, prepared, shown))


def _put_views(store: Store, prepared: Prepared, shown: list[np.ndarray]) -> str | None:
    """Stores the features of views; None for none."""
    return _extracted(store, prepared, bare(shown)) if shown else None


def _extracted(store: Store, prepared: Prepared, images: ImageSet) -> str:
    """Key of the features of images, which are computed if they are not in the store."""
    return extract_output(store, prepared.backbone, images, prepared.patches).key


def _put(store: Store, prepared: Prepared, features: Features, ids: list[str]) -> str:
    """Stores the features of a set that was put together of several outputs, under a key of their own content."""
    inputs = feature_inputs(prepared.backbone.config, prepared.backbone.identity, prepared.patches) | {
        "set": ids,
        "pooled": hashlib.sha256(features.pooled.tobytes()).hexdigest(),
    }
    return store.get_or_make("features", FEATURES_VERSION, inputs, lambda a: write_features(a, features)).key


def takes(config: Detector, anomalies: bool) -> bool:
    """Whether a detector is fitted with, or without, anomalies: some ignore them, some need them."""
    detector = build(config)
    return not detector.ignores_anomalies if anomalies else not detector.needs_anomalies


def _takes_arm(config: Detector, arm: Arm) -> bool:
    if arm.name == VIEWED:  # which those alone read that learn from anomalies
        return takes(config, True) and takes(config, False)
    return takes(config, arm.features is not None)


def _train_keys(config: RunConfig, store: Store, prepared: Prepared, loop: LoopResult) -> tuple[str, str]:
    """Keys of the features of the training normals, real alone, and with those drawn that train as well."""
    real = _extracted(store, prepared, prepared.normals.train)
    if not (config.detect.drawn_normals and loop.normals.ids):
        return real, real
    shown = range(len(loop.normals.ids))[TRAINED]
    both = Features.join([prepared.train, loop.normals.features.take(shown)])
    ids = [*prepared.normals.train.ids, *(loop.normals.ids[i] for i in shown)]
    return real, _put(store, prepared, both, ids)


def unseen_drawn_normals(config: RunConfig, loop: LoopResult) -> Features:
    """Drawn normal captions that the served detector was not trained with: the control of artefacts."""
    everything = range(len(loop.normals.ids))
    return loop.normals.features.take(everything[UNSEEN] if config.detect.drawn_normals else everything)


def normal_views(config: RunConfig, normals: Sequence[np.ndarray], anomalies: int) -> list[np.ndarray]:
    """As many views of normals as so many anomalies have, spread over the training normals."""
    wanted, count = config.detect.views * anomalies, len(normals)
    places = np.arange(wanted) % count if wanted > count else np.linspace(0, count - 1, wanted).astype(int)
    return views.views([normals[i] for i in places], 1, config.seed)


def _fit_all(
    config: RunConfig,
    store: Store,
    prepared: Prepared,
    loop: LoopResult,
    arms: list[Arm],
    done: Callable[[int], None],
    ahead: Callable[[], train.Ahead | None] = lambda: None,
) -> dict[tuple[str, str, int], str]:
    """Keys of all fits by (detector, arm, seed), made where they are missing; `done` hears how many are there.

    Arms with the same set, as the zero-th and KKA's without rounds after the zero-th, share their fits.
    """
    real_key, drawn_key = _train_keys(config, store, prepared, loop)
    shown = normal_views(config, prepared.normals.train.images, max(arm.count for arm in arms))
    normals_key = _put_views(store, prepared, shown)
    validation_key = _extracted(store, prepared, prepared.normals.validation)
    fits: dict[tuple[str, str, int], str] = {}
    missing: dict[str, dict[str, Any]] = {}
    for detector in config.detect.detectors:
        for arm in arms:
            if not _takes_arm(detector, arm):
                continue
            # Where drawn normals are given as anomalies they cannot be given as normals, too.
            train_key = real_key if arm.name in (BASELINE, "drawn_normals") else drawn_key
            for seed in range(config.detect.seeds):
                inputs = {
                    "detector": detector.model_dump(mode="json"),
                    "train": train_key,
                    "validation": validation_key,
                    "anomalies": arm.features,
                    "views": [normals_key, arm.views] if arm.views or arm.name == VIEWED else None,
                    "weights": arm.weights,
                    "seed": config.seed * 1000 + seed,
                    "false_positive_rate": config.detect.false_positive_rate,
                    "calibration": CALIBRATION,
                    "threads": config.cluster.train_threads,
                    "sharing": config.detect.workers if config.detect.share == "steps" else 1,
                    "versions": versions.computing(config.cluster.train_runtime_env.pip),
                }
                key = stage_key("fit", FIT_VERSION, inputs)
                fits[detector.kind, arm.name, seed] = key
                if store.find("fit", key) is None:
                    missing[key] = {
                        "detector": detector,
                        "train": train_key,
                        "anomalies": arm.features,
                        "views": inputs["views"],
                        "weights": arm.weights,
                        "seed": inputs["seed"],
                        "inputs": inputs,
                    }
    if missing:
        arguments = {
            "store": store.uri,
            "backbone": config.backbone,
            "backbone_identity": prepared.backbone.identity,
            "patches": prepared.patches,
            "validation": validation_key,
            "false_positive_rate": config.detect.false_positive_rate,
            "share": config.detect.share,
            "fits": list(missing.values()),
        }
        with _counting(store, list(fits.values()), done):
            workers = config.detect.workers
            train.run("detect", fit_worker, arguments, workers, config.cluster, gpus=False, ahead=ahead())
    return fits


@contextmanager
def _counting(store: Store, keys: list[str], done: Callable[[int], None]) -> Iterator[None]:
    """Within the block `done` hears every few seconds how many of the fits are in the store."""
    missing, stop = set(keys), threading.Event()

    def look() -> None:
        while not stop.wait(_LOOK_SECONDS):
            missing.difference_update([key for key in missing if store.has("fit", key)])
            done(sum(key not in missing for key in keys))

    thread = threading.Thread(target=look, name="kka-fits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _fit_output(store: Store, key: str) -> Output:
    return store.reported("fit", key)


def review(scores: np.ndarray, count: int) -> list[int]:
    """Rows of the `count` most anomalous images, the most anomalous first."""
    return [int(i) for i in np.argsort(-scores, kind="stable")[:count]]
