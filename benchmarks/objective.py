"""What a sweep's objective tells of the test AUC: `python benchmarks/objective.py --run DIR --run DIR ...`.

Finished runs have detectors fitted with sets that are worth more and less. Each is scored on the run's validation
normals, on drawn normals that no detector was fitted with, and on drawn anomalies that are in no set: hard or between,
of round 0. Beside the AUCs stands the test AUC that the run measured, and how both rank the detectors. The run's
configuration names the store that holds the detectors. Writes `benchmarks/results/objective.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from kka_ray.config import load
from kka_ray.config.models import RunConfig
from kka_ray.data.decode import decode
from kka_ray.detectors.tuned import TunedDetector
from kka_ray.evaluation import KKA, UNSEEN, ZEROTH
from kka_ray.experiment import absolute, computing
from kka_ray.features.base import Features
from kka_ray.files import write_json
from kka_ray.objective import mean_aucs
from kka_ray.prepare import prepare
from kka_ray.store import Store

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "objective.json"
MEASURES = ("validation", "drawn", "objective")


def measure(run: Path, detector: str) -> list[dict[str, Any]]:
    """A row an arm and seed of the detector in a finished run. The arm that drawn normals trained is left out."""
    config = absolute(load(run / "config.yaml", RunConfig))
    store, records = Store(config.store.uri), run / "records"
    fitted = pd.read_parquet(records / "evaluation.parquet")
    fitted = fitted[(fitted["detector"] == detector) & (fitted["arm"] != "drawn_normals")]
    with computing(config.cluster.driver_threads):
        prepared = prepare(config, store)

        def features_of(pictures: Sequence[bytes]) -> Features:
            return prepared.backbone.extract([decode(p, "a drawn image") for p in pictures], prepared.patches)

        drawn = pd.read_parquet(records / "drawn_normals.parquet")
        normals = features_of(list(drawn[drawn["status"] == "ok"]["image"])[UNSEEN])
        anomalies = features_of(_anomalies(records))
        rows = []
        for row in fitted.itertuples():
            output = store.find("fit", row.fit)
            if output is None:
                raise SystemExit(f"{run}: the store {config.store.uri} no longer holds the detector {row.fit}")
            tuned = TunedDetector.load(output.local / "detector", prepared.backbone)
            kinds = {"validation": prepared.validation, "drawn": normals}
            found = {name: mean_aucs([tuned], [kind], anomalies)[0] for name, kind in kinds.items()}
            found["objective"] = float(np.mean([*found.values()]))
            rows.append({"run": run.name, "arm": row.arm, "seed": int(row.seed), "test": float(row.auc), **found})
    return rows


def _anomalies(records: Path) -> list[bytes]:
    verdicts = pd.read_parquet(records / "verdicts.parquet")
    wanted = set(verdicts[(verdicts["round"] == 0) & verdicts["label"].isin(["hard", "between"])]["id"])
    wanted -= set(pd.read_parquet(records / "kept.parquet")["id"])
    drawn = pd.read_parquet(records / "renderings.parquet")
    return list(drawn[drawn["id"].isin(wanted)].sort_values("id")["image"])


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means by arm, and the mean over runs of each measure's rank correlation with the test AUC: of all arms, and of
    those with drawn anomalies, as the trials of a sweep have them (None where a measure is the same for all)."""
    table = pd.DataFrame(rows)
    names = ["test", *MEASURES]
    arms = table.groupby("arm")[names].mean().sort_values("test")
    return {
        "arms": arms.reset_index().to_dict("records"),
        "rank_correlation": _ranks(table),
        "rank_correlation_of_drawn": _ranks(table[table["arm"].isin([ZEROTH, KKA])]),
    }


def _ranks(table: pd.DataFrame) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in MEASURES:
        runs = [run for _, run in table.groupby("run") if run[name].nunique() > 1]
        found[name] = float(np.mean([spearmanr(run["test"], run[name])[0] for run in runs])) if runs else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, action="append", required=True, help="folder of a finished run")
    parser.add_argument("--detector", default="simplenet")
    parser.add_argument("--target", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows = [row for run in arguments.run for row in measure(run, arguments.detector)]
    write_json(arguments.target, {"detector": arguments.detector, **summary(rows), "rows": rows})


if __name__ == "__main__":
    main()
