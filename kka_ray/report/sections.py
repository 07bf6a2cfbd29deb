"""The sections of the report: for each, the values that its template shows. The template says what there is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kka_ray.report import charts, wording
from kka_ray.report.pictures import exact, thumbnail
from kka_ray.report.run_folder import LABELS, Rows, RunFolder

GRID = 24
"""Images in each grid."""

SHEET = 200
"""Images in the contact sheet at most."""

_MAP_POINTS = 1500
"""Points of a label in the map at most."""

_MEASURES: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("hard_rate", "Hard rate", "lines that became hard images", wording.percent),
    ("normal_class_rate", "Normal-class share", "lines that describe the normal class", wording.percent),
    ("diversity", "Diversity", "mean cosine distance between lines", "{:.3f}".format),
    ("unique_share", "Unique lines", "different lines as a share of all", wording.percent),
    ("distinct_2", "Distinct-2", "different word pairs as a share of all", "{:.3f}".format),
    ("perplexity", "Perplexity", "of the lines, under the untuned model", "{:.1f}".format),
)


def page(run: RunFolder) -> dict[str, Any]:
    """Everything that the template shows."""
    return {
        "summary": run.summary,
        "budget_rule": wording.budget_rule(run.summary),
        "config": run.config,
        "config_text": run.config_text,
        "calibration": run.calibration,
        "has_auc": wording.has_auc(run.summary),
        "reading": wording.reading(run.summary, run.calibration),
        "cautions": wording.cautions(run.summary),
        "labels": LABELS,
        "names": wording.LABELS,
        "marker": charts.marker,
        "result": result(run),
        "rounds": rounds(run.summary["rounds"]),
        "lines": lines(run),
        "judge": judge(run),
        "grids": grids(run),
        "kept": kept(run),
        "dpo": dpo(run),
        "truth": truth(run.summary),
        "review": review(run),
        "timings": timings(run),
    }


def result(run: RunFolder) -> dict[str, Any]:
    """The headline table, detectors by arms, the headline detector's other measures, and its seeds as a chart."""
    detectors, headline = run.summary["detectors"], run.summary["detector"]
    given = {arm for row in detectors.values() for arm in row}
    names = {arm: name for arm, name in wording.arms(run.summary).items() if arm in given}
    table = []
    for kind, row in detectors.items():
        if row:
            best = max(spread["mean"] for spread in row.values())
            cells = [row[a] | {"best": len(row) > 1 and row[a]["mean"] == best} if a in row else None for a in names]
            table.append({"name": wording.plain(kind, wording.DETECTORS), "headline": kind == headline, "cells": cells})
    own = detectors.get(headline, {})
    shown = [
        charts.Spread(
            wording.short(name), own[arm]["per_seed"], own[arm]["mean"], own[arm]["std"], wording.auc(own[arm])
        )
        for arm, name in names.items()
        if arm in own
    ]
    counts = {row["arm"]: row["count"] for row in run.evaluation}
    title = wording.plain(headline, wording.DETECTORS)
    return {
        "headline": title,
        "viewed": own.get("normal_views"),
        "ours": wording.ours(run.summary),
        "arms": [{"name": name, "count": counts.get(arm, 0)} for arm, name in names.items()],
        "table": table,
        "chart": charts.spreads(shown, f"AUC of {title}") if shown else None,
        "measures": _measures(run.evaluation, headline, names),
        "seeds": max((len(s.values) for s in shown), default=0),
        "varies": any(wording.varies(spread) for row in detectors.values() for spread in row.values()),
    }


def _measures(evaluation: Rows, detector: str, names: Mapping[str, str]) -> Rows:
    out = []
    for arm, name in names.items():
        rows = [r for r in evaluation if r["detector"] == detector and r["arm"] == arm]
        if rows:
            means = {k: float(np.mean([r[k] for r in rows])) for k in ("auc", "aupr", "fpr95", "fit_seconds")}
            out.append({"arm": name, "count": rows[0]["count"], **means})
    return out


def rounds(rows: Rows) -> dict[str, Any]:
    """A small chart a measure."""
    shown = [
        {"title": title, "note": note, "svg": charts.series([r[key] for r in rows], title, write)}
        for key, title, note, write in _MEASURES
        if rows and all(r[key] is not None for r in rows)
    ]
    return {"charts": shown, "stalled": [(i, r["status"]) for i, r in enumerate(rows) if r["status"] != "ok"]}


def lines(run: RunFolder) -> dict[str, Any]:
    """What became of the lines: the funnel over all rounds, a row a round, and the reasons of refusal."""
    rows = run.summary["rounds"]
    reasons: Counter[str] = Counter()
    table = []
    for number, row in enumerate(rows):
        rejected = {reason: times for reason, times in row["rejected"].items() if reason != "error"}
        reasons.update(rejected)
        written, refused = row["described"] - row["rejected"].get("error", 0), sum(rejected.values())
        table.append({"round": number, "written": written, "refused": refused, "passed": written - refused, **row})
    names = ("written", "passed", "rendered", "failed", "refused", "kept", *LABELS)
    total = {name: sum(row[name] for row in table) for name in names}
    errors = Counter(r["error"] for r in run.renderings if r["status"] == "failed")
    return {
        "table": table,
        "total": total,
        "reasons": [(wording.plain(k, wording.REASONS), n) for k, n in reasons.most_common()],
        "errors": errors.most_common(5),
    }


def judge(run: RunFolder) -> dict[str, Any]:
    """Histograms of hardness and the two latent maps; None each where nothing was drawn."""
    audit = run.summary["audit"]
    if not run.verdicts or not run.normal_hardness:
        return {"histogram": None, "maps": None, "audit": audit}
    by_label = {name: [v["hardness"] for v in run.verdicts if v["label"] == name] for name in LABELS}
    edges = (audit["band_lower"], audit["band_upper"], audit["band_easy"])
    return {
        "histogram": charts.histogram(run.normal_hardness, by_label, *edges),
        "maps": _maps(run.latent),
        "audit": audit,
        # As the judge does, which leaves fewer than four out.
        "drawn_normals": run.config["confusion"]["drawn_normals"] and run.config["render"]["normals"] >= 4,
    }


def _maps(rows: Rows) -> dict[str, Any] | None:
    if not rows:
        return None
    points: dict[str, dict[str, list[charts.Point]]] = {"before": {}, "after": {}}
    thinned = False
    for label in ("normal", *LABELS):
        own = [r for r in rows if r["label"] == label]
        step = -(-len(own) // _MAP_POINTS) or 1
        thinned = thinned or step > 1
        for when in points:
            points[when][label] = [(r[f"x_{when}"], r[f"y_{when}"]) for r in own[::step]]
    distances = [float(np.hypot(*p)) for part in points.values() for own in part.values() for p in own]
    # One scale for both, so that what moved can be seen; a few marks far out would squeeze all others.
    farthest = max(1.5, float(np.quantile(distances, 0.99)))
    titles = {"before": "Before training on drawn images", "after": "After training"}
    return {
        "maps": [{"title": t, "svg": charts.latent(points[w], farthest, t)} for w, t in titles.items()],
        "beyond": sum(d > farthest for d in distances),
        "thinned": thinned,
    }


def grids(run: RunFolder) -> Rows:
    """The hard images nearest to normal, the easiest and the normal-like ones, each with its description."""
    text = {d["id"]: d["text"] for d in run.descriptions}
    wanted = {
        label: sorted((v for v in run.verdicts if v["label"] == label), key=lambda v: (sign * v["hardness"], v["id"]))
        for label, sign in (("hard", 1), ("easy", -1), ("normal_like", 1))
    }
    images = run.images([v["id"] for verdicts in wanted.values() for v in verdicts[:GRID]])
    last = f"round-{len(run.summary['rounds']) - 1}"
    kept_ids = {k["id"] for k in run.kept if k["set"] == last}
    return [
        {
            "label": label,
            "total": len(verdicts),
            "kept": sum(v["id"] in kept_ids for v in verdicts),
            "tiles": [v | {"text": text[v["id"]], "picture": exact(images[v["id"]], v["id"])} for v in verdicts[:GRID]],
        }
        for label, verdicts in wanted.items()
    ]


def kept(run: RunFolder) -> dict[str, Any]:
    """The set after each round, and the contact sheet of the last: an even choice where it is large."""
    order = {"hard": 0, "between": 1, "unjudged": 2, "easy": 3}
    text = {d["id"]: d["text"] for d in run.descriptions}
    table, before, last = [], set[str](), []
    for number in range(len(run.summary["rounds"])):
        last = [k for k in run.kept if k["set"] == f"round-{number}"]
        ids = {k["id"] for k in last}
        labels = Counter(k["label"] for k in last)
        table.append({"round": number, "total": len(last), "new": len(ids - before), "labels": labels})
        before = ids
    last.sort(key=lambda k: (order[k["label"]], k["hardness"], k["id"]))
    chosen = [last[i * len(last) // SHEET] for i in range(SHEET)] if len(last) > SHEET else last
    images = run.images([k["id"] for k in chosen])
    tiles = [k | {"text": text[k["id"]], "picture": thumbnail(images[k["id"]], k["id"])} for k in chosen]
    return {"table": table, "total": len(last), "tiles": tiles, "labels": list(order)}


def dpo(run: RunFolder) -> dict[str, Any]:
    """Loss and margin by step, a line a round, a row a training, and what there was to learn."""
    table = [{"round": i, **r["dpo"]} for i, r in enumerate(run.summary["rounds"]) if r["dpo"]]
    shown = []
    for key, title in (("loss", "Loss"), ("margin", "Margin of the implicit rewards")):
        by_round: dict[str, list[charts.Point]] = {}
        for row in run.dpo:
            by_round.setdefault(f"round {row['round']}", []).append((row["step"], row[key]))
        if by_round:
            shown.append({"title": title, "svg": charts.curves(by_round, title)})
    rejected = wording.listed([f"to {wording.REJECTED[kind]}" for kind in run.config["preference"]["rejected"]])
    return {
        "table": table,
        "rounds": wording.listed([str(row["round"]) for row in table]),
        "charts": shown,
        "rejected": rejected,
        "signal": run.summary.get("text_signal", {}),
    }


def truth(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The demo domain's truth about the drawn images; None where there is none to know."""
    if "truth" not in summary:
        return None
    known = summary["truth"]
    if not known:
        return {"known": None}
    by_round = known["distance_by_round"]
    return {
        "known": known,
        "chart": charts.series(by_round, "Mean true distance", "{:.2f}".format)
        if by_round and None not in by_round
        else None,
        "table": [
            {
                "label": name,
                "distance": known["distance_by_label"][name],
                "normal": known["normal_share_by_label"][name],
            }
            for name in LABELS
            if name in known["distance_by_label"]
        ],
    }


def review(run: RunFolder) -> Rows:
    """The validation normals that the headline detector finds most anomalous."""
    return [row | {"picture": exact(row["image"], row["id"])} for row in run.review]


def timings(run: RunFolder) -> dict[str, Any]:
    """Seconds of the stages a round, of the fits, and of the whole run."""
    rows = run.summary["rounds"]
    stages = list(dict.fromkeys(k for r in rows for k in r["seconds"] if not k.endswith("_work")))
    work = list(dict.fromkeys(k for r in rows for k in r["seconds"] if k.endswith("_work")))
    fits = {r["fit"]: r["fit_seconds"] for r in run.evaluation}  # arms with the same set share them
    table = [
        {
            "round": i,
            "stages": [r["seconds"].get(s, 0.0) for s in stages],
            "work": [r["seconds"].get(s, 0.0) for s in work],
            "total": sum(r["seconds"].get(s, 0.0) for s in stages),
        }
        for i, r in enumerate(rows)
    ]
    return {
        "stages": [wording.plain(s, wording.STAGES) for s in stages],
        "work": [wording.plain(s, wording.STAGES) for s in work],
        "table": table,
        "longest": max((row["total"] for row in table), default=0.0),
        "rounds": sum(row["total"] for row in table),
        "fits": sum(fits.values()),
        "fit_count": len(fits),
        "wall": run.summary["wall_seconds"],
    }
