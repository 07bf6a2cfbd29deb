"""What the demo's detectors would gain from anomalies that show just what they should: `python benchmarks/ceiling.py`.

In the place of what the language model imagines and the renderer draws stand anomalies that the domain itself draws,
none of them with a combination of attributes that is tested: as many as the demo keeps, and more. So the gain of the
demo can be held against what is there to be gained. Writes `benchmarks/results/ceiling.json`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kka_ray.config import load
from kka_ray.config.models import RunConfig
from kka_ray.data import flowers
from kka_ray.detectors.tuned import VERSION, TunedDetector
from kka_ray.evaluation import metrics, normal_views, takes
from kka_ray.experiment import absolute, computing
from kka_ray.features import views
from kka_ray.features.base import Features
from kka_ray.files import write_json
from kka_ray.loop import budget
from kka_ray.prepare import Prepared, bare, extract, prepare, test_set
from kka_ray.store import Store

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "ceiling.json"
_STREAM = 3
"""Of the random numbers; the domain's own lists have 0 to 2."""


def anomalies(count: int, seed: int) -> list[np.ndarray]:
    """Anomalies with the distances of the test's, but none of its combinations of attributes."""
    rng = np.random.default_rng([seed, _STREAM])
    return [drawn.image for drawn in flowers.make_anomalies(count, rng, held_out=False)]


def measure(config: RunConfig, detectors: list[str], counts: list[int]) -> list[dict[str, Any]]:
    """A row a detector and number of anomalies: none, the demo's budget, and `counts`."""
    store = Store(config.store.uri)
    prepared = prepare(config, store)
    test = test_set(config, prepared.data, store)
    assert test is not None
    tested = extract(store, prepared.backbone, test, prepared.patches)
    kept = budget(config.loop, prepared.count)
    wanted = sorted({0, kept, *counts})
    images = anomalies(max(wanted), config.seed)
    rows = []
    for count in wanted:
        known, given = _given(config, prepared, store, images[:count])
        for kind in detectors:
            detector = next(d for d in config.detect.detectors if d.kind == kind)
            if not takes(detector, count > 0):
                continue
            tuned = TunedDetector.fit(
                detector,
                prepared.backbone,
                known,
                given,
                prepared.validation,
                config.seed * 1000,
                config.detect.false_positive_rate,
            )
            auc = metrics(tuned.score(tested).score, test.anomalous)["auc"]
            rows.append({"detector": kind, "count": count, "budget": kept, "seed": config.seed, "auc": auc})
            print(rows[-1], flush=True)
    return rows


def _given(
    config: RunConfig, prepared: Prepared, store: Store, images: list[np.ndarray]
) -> tuple[Features, Features | None]:
    """Training normals and anomalies, with the views that the demo gives them."""
    if not images:
        return prepared.train, None

    def features(pictures: list[np.ndarray]) -> Features:
        return extract(store, prepared.backbone, bare(pictures), prepared.patches)

    of_normals = features(normal_views(config, prepared.normals.train.images, len(images)))
    of_anomalies = features(views.views(images, config.detect.views, config.seed))
    return replace(prepared.train, views=of_normals), replace(features(images), views=of_anomalies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the domain and of the fits")
    parser.add_argument("--counts", type=int, nargs="*", default=[1000], help="beside none and the demo's budget")
    parser.add_argument("--detectors", nargs="*", default=["simplenet", "fused"])
    parser.add_argument("--target", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        config = absolute(load(ROOT / "configs" / "demo.yaml", RunConfig, [f"seed={seed}"]))
        with computing(config.cluster.driver_threads):
            rows += measure(config, arguments.detectors, arguments.counts)
        write_json(arguments.target, {"made_with": {"detectors": VERSION}, "rows": rows})


if __name__ == "__main__":
    main()
