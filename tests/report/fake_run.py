"""A fake run's folder for unit tests: flower pictures and captions, invented numbers, every table that a run has."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kka_ray.config import config_hash, dump
from kka_ray.config.models import ConfusionConfig, FlowersData, LoopConfig, RunConfig
from kka_ray.confusion.hardness import Band
from kka_ray.data import flowers
from kka_ray.data.decode import encode_png
from kka_ray.records import Description, Rendering, Verdict, to_table

NORMALS = 2000
_REASONS = ("normal_class", "near_duplicate", "duplicate", "too_long", "malformed", "error: out of memory")
_ARMS = {"baseline": 0.0, "zeroth": 0.024, "kka": 0.041, "cutpaste": -0.012, "noise": 0.004}


@functools.cache
def bank() -> list[tuple[bytes, str, int]]:
    """48 pictures: (PNG, caption, true distance), few enough to draw quickly; a run repeats them."""
    rng = np.random.default_rng(5)
    drawn = []
    for i in range(48):
        distance = (0, 1, 1, 2, 3, 4)[i % 6]
        kind = flowers.sample_anomaly(rng, distance, held_out=False) if distance else flowers.sample_normal(rng)
        drawn.append(flowers.make(kind, rng))
    return [(encode_png(d.image), d.caption, d.flower.distance) for d in drawn]


def write(
    folder: Path,
    *,
    rounds: int = 3,
    lines: int = 256,
    shift: float = 0.0,
    drawable: bool = True,
    trained: bool = True,
    anomalies: bool = True,
    seeds: int = 3,
    text: str | None = None,
) -> dict[str, Any]:
    """Writes the folder and returns its summary.

    `rounds`: with the zero-th. `shift`: added to every hardness; 100 leaves no image hard. `drawable`: False fails
    every render. `trained`: False stalls the rounds. `anomalies`: False is a data set without test anomalies.
    `text`: every description.
    """
    rng = np.random.default_rng(0)
    config = RunConfig(
        name="fake-demo", data=FlowersData(kind="flowers"), loop=LoopConfig(rounds=max(rounds - 1, 0), lines=lines)
    )
    normal_hardness = _normal_hardness(rng)
    band = Band.of(normal_hardness, ConfusionConfig())
    descriptions, renderings, verdicts = _records(rng, rounds, lines, shift, drawable, band, text)
    kept = _kept(rounds, verdicts)
    history = _history(rng, rounds) if trained else []
    evaluation = _evaluation(rng, seeds, kept) if anomalies else []
    summary = {
        "name": config.name,
        "config_hash": config_hash(config),
        "versions": {"kka_ray": "0.1.0", "python": "3.11.9", "numpy": "2.3.0", "torch": "2.13.0", "ray": "2.60.0"},
        "detector": "simplenet",
        "auc": {arm: _spread(evaluation, "simplenet", arm) for arm in ("baseline", "zeroth", "kka")},
        "detectors": {
            kind: {arm: s for arm in _ARMS if (s := _spread(evaluation, kind, arm))}
            for kind in ("simplenet", "knn", "fused")
        },
        "normals": NORMALS,
        "dropped": {"duplicate": 3},
        "test": {"normals": 600 if anomalies else 0, "anomalies": 600 if anomalies else 0, "dropped": {}},
        "budget": 100,
        "budget_rule": "share",
        "described_fraction": len(descriptions) / NORMALS,
        "drawn_fraction": len(verdicts) / NORMALS,
        "generated_fraction": len(_last(kept, rounds)) / NORMALS,
        "kept": dict(Counter(k["label"] for k in _last(kept, rounds))),
        "rounds": [_round(i, descriptions, renderings, verdicts, kept, history) for i in range(rounds)],
        "audit": _audit(band, verdicts),
        "evaluation": evaluation,
        "truth": _truth(verdicts, _last(kept, rounds), rounds),
        "text_signal": {"lines": len(verdicts), "spearman": 0.57, "hard_auc": 0.71},
        "threshold": 3.1416,
        "validation_flagged": 0.1,
        "wall_seconds": 1284.6,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False))
    (folder / "detector").mkdir(exist_ok=True)
    calibration = {"threshold": 3.1416, "false_positive_rate": 0.05}
    (folder / "detector" / "detector.json").write_text(json.dumps({"calibration": calibration}))
    tables = {
        "descriptions": to_table(Description, descriptions),
        "renderings": to_table(Rendering, renderings),
        "verdicts": to_table(Verdict, verdicts),
        "kept": pa.Table.from_pylist(kept),
        "normal_hardness": pa.table({"hardness": normal_hardness}),
        "latent": pa.Table.from_pylist(_latent(rng, verdicts)),
        "dpo": pa.Table.from_pylist(history),
        "evaluation": pa.Table.from_pylist(evaluation),
        "review": _review(),
    }
    (folder / "records").mkdir(exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, folder / "records" / f"{name}.parquet", compression="zstd")
    return summary


def _normal_hardness(rng: np.random.Generator) -> np.ndarray:
    raw = rng.gamma(6, 0.4, 1200)
    return (raw - np.median(raw)) / np.median(np.abs(raw - np.median(raw)))


def _picture(id_: str) -> tuple[bytes, str, int]:
    return bank()[int.from_bytes(hashlib.sha256(id_.encode()).digest()[:4], "big") % len(bank())]


def _records(
    rng: np.random.Generator, rounds: int, lines: int, shift: float, drawable: bool, band: Band, text: str | None
) -> tuple[list[Description], list[Rendering], list[Verdict]]:
    descriptions, renderings, verdicts = [], [], []
    for number in range(rounds):
        for line in range(lines):
            id_ = f"r{number}-p{line % 16:03d}-s{line // 16:02d}"
            png, caption, distance = _picture(id_)
            said = text if text is not None else caption
            reason = str(rng.choice(_REASONS, p=[0.4, 0.2, 0.15, 0.15, 0.08, 0.02])) if rng.random() < 0.24 else ""
            status: Any = "rejected" if reason else "ok"
            descriptions.append(Description(id_, id_[3:7], number, said + "\n", said, status, reason))
            if reason:
                continue
            if not drawable or rng.random() < 0.01:
                renderings.append(Rendering(id_, number, line, "failed", b"", "", "ValueError: not finite"))
                continue
            renderings.append(Rendering(id_, number, line, "ok", png, hashlib.sha256(png).hexdigest()))
            hardness = float(rng.normal(1.2 + (2.6 - 0.35 * number) * distance, 1.6)) + shift
            hardness += float(rng.exponential(6)) * (distance >= 3)
            verdicts.append(Verdict(id_, number, line % 3, float(np.exp(hardness)), hardness, band.label(hardness)))
    return descriptions, renderings, verdicts


def _kept(rounds: int, verdicts: list[Verdict]) -> list[dict[str, Any]]:
    rank = {"hard": 0, "between": 1, "easy": 2}
    out = []
    for number in range(rounds):
        if number == 0:
            first = [v for v in verdicts if v.round == 0][:100]
            rows = [{"id": v.id, "round": 0, "label": "unjudged", "hardness": 0.0} for v in first]
        else:
            fit = [v for v in verdicts if v.round <= number and v.label != "normal_like"]
            best = sorted(fit, key=lambda v: (rank[v.label], v.id))[:100]
            rows = [{"id": v.id, "round": v.round, "label": v.label, "hardness": v.hardness} for v in best]
        out += [{"set": f"round-{number}", **row} for row in rows]
    return out


def _last(kept: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    return [k for k in kept if k["set"] == f"round-{rounds - 1}"]


def _history(rng: np.random.Generator, rounds: int) -> list[dict[str, Any]]:
    return [
        {
            "round": number,
            "step": float(step),
            "loss": float(0.69 * np.exp(-step / (28 - 6 * number)) + 0.03 * rng.random()),
            "margin": float(1.9 * (1 - np.exp(-step / 18)) * (0.7 + 0.3 * number) + 0.1 * rng.normal()),
            "accuracy": 0.9,
            "learning_rate": 2e-4,
        }
        for number in range(1, rounds)
        for step in range(1, 31)
    ]


def _evaluation(rng: np.random.Generator, seeds: int, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for kind, base in (("simplenet", 0.8911), ("knn", 0.8627), ("fused", 0.8702)):
        for arm, gain in _ARMS.items():
            unwanted = (kind == "knn" and arm != "baseline") or (kind == "fused" and arm == "baseline")
            if unwanted or (arm != "baseline" and not kept):
                continue
            for seed in range(seeds):
                auc = base + gain + float(rng.normal(0, 0.004))
                rows.append(
                    {
                        "detector": kind, "arm": arm, "count": 0 if arm == "baseline" else 100, "seed": seed,
                        "auc": auc, "aupr": auc + 0.01, "fpr95": 1.2 - auc, "fit_seconds": 9.5,
                        "fit": f"{kind}-{arm}-{seed}",
                    }
                )  # fmt: skip
    return rows


def _spread(evaluation: list[dict[str, Any]], kind: str, arm: str) -> dict[str, Any] | None:
    values = [r["auc"] for r in evaluation if r["detector"] == kind and r["arm"] == arm]
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": std, "per_seed": values}


def _round(
    number: int,
    descriptions: list[Description],
    renderings: list[Rendering],
    verdicts: list[Verdict],
    kept: list[dict[str, Any]],
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    own = [d for d in descriptions if d.round == number]
    drawn = [r for r in renderings if r.round == number]
    labels = Counter(v.label for v in verdicts if v.round == number)
    steps = [h for h in history if h["round"] == number]
    training = None
    if steps:
        last = steps[-1]
        training = {
            "pairs": 96, "steps": len(steps), "loss_first": steps[0]["loss"], "loss_last": last["loss"],
            "margin": last["margin"],
        }  # fmt: skip
    stalled = number > 0 and not steps
    return {
        "described": len(own),
        "unique": len(own),
        "rejected": dict(sorted(Counter(d.reason for d in own if d.reason).items())),
        "rendered": sum(r.status == "ok" for r in drawn),
        "mismatched": 0,
        "failed": sum(r.status == "failed" for r in drawn),
        **{label: labels[label] for label in ("hard", "between", "easy", "normal_like")},
        "hard_rate": labels["hard"] / max(len(own), 1),
        "normal_class_rate": sum(d.reason == "normal_class" for d in own) / max(len(own), 1),
        "diversity": 0.412 - 0.03 * number,
        "unique_share": 0.97 - 0.02 * number,
        "distinct_2": 0.231 - 0.016 * number,
        "perplexity": 4.2 + 0.5 * number,
        "kept": sum(k["set"] == f"round-{number}" for k in kept),
        "status": "stalled: 3 pairs, fewer than min_pairs = 8" if stalled else "ok",
        "seconds": {
            "prefer": 151.3 if steps else 0.01, "describe_and_render": 92.4 - 4 * number, "judge": 31.2 + 9 * number,
            "describe_work": 61.52, "render_work": 74.1,
        },
        "dpo": training,
    }  # fmt: skip


def _audit(band: Band, verdicts: list[Verdict]) -> dict[str, float]:
    if not verdicts:
        return {"drawn": 0.0}
    return {
        "drawn": float(len(verdicts)),
        "fold_0/auc": 0.91,
        "collapsed_folds": 0.0,
        "auc": 0.9,
        "band_lower": band.lower,
        "band_upper": band.upper,
        "band_easy": band.easy,
        "band_empty": float(band.is_empty),
    }


def _truth(verdicts: list[Verdict], kept: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
    if not verdicts:
        return {}
    distance = {v.id: _picture(v.id)[2] for v in verdicts}
    by_label: dict[str, list[int]] = {}
    for v in verdicts:
        by_label.setdefault(v.label, []).append(distance[v.id])
    true = [distance[k["id"]] for k in kept]
    return {
        "spearman": 0.713,
        "kept_normal_share": sum(d == 0 for d in true) / len(true) if true else 0.0,
        "kept_mean_distance": float(np.mean(true)) if true else 0.0,
        "distance_by_round": [
            float(np.mean(own)) if (own := [distance[v.id] for v in verdicts if v.round == n]) else None
            for n in range(rounds)
        ],
        "distance_by_label": {k: float(np.mean(v)) for k, v in by_label.items()},
        "normal_share_by_label": {k: sum(d == 0 for d in v) / len(v) for k, v in by_label.items()},
    }


def _latent(rng: np.random.Generator, verdicts: list[Verdict]) -> list[dict[str, Any]]:
    if not verdicts:
        return []
    rows = []
    for label, hardness in [("normal", 0.0)] * 400 + [(v.label, v.hardness) for v in verdicts]:
        before = rng.normal(0, 0.7 + 0.05 * np.clip(hardness, -4, 10), 2)
        angle = rng.uniform(0, 2 * np.pi)
        radius = np.exp(0.13 * (hardness + (label == "normal") * rng.normal(0, 1.4))) * rng.uniform(0.6, 1.0)
        after = radius * np.array([np.cos(angle), np.sin(angle)])
        names = ("x_before", "y_before", "x_after", "y_after")
        rows.append({"label": label, **dict(zip(names, (*before.tolist(), *after.tolist()), strict=True))})
    return rows


def _review() -> pa.Table:
    normals = [b for b in bank() if b[2] == 0]
    scores = [4.4 - 0.19 * i for i in range(24)]
    return pa.table(
        {
            "id": [f"normal-{37 * i:05d}" for i in range(24)],
            "image": [normals[i % len(normals)][0] for i in range(24)],
            "score": scores,
            "anomalous": [s > 3.1416 for s in scores],
        }
    )
