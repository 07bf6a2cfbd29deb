"""A whole run: normals in; the loop, the evaluation, and a folder with summary, records, detector and report out.

The same command run again after an interruption finishes the run: what is in the store is not made again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kka_ray import tracking, versions
from kka_ray.cluster.plan import make_plan
from kka_ray.cluster.session import nodes, session
from kka_ray.config import config_hash, dump
from kka_ray.config.models import ApiSampler, FlowersData, RunConfig
from kka_ray.data.decode import encode_png
from kka_ray.detectors.tuned import TunedDetector
from kka_ray.errors import ConfigError, ResourceError
from kka_ray.evaluation import Evaluation, evaluate, headline_detector, metrics, review
from kka_ray.features.base import Features
from kka_ray.files import write_json, write_text
from kka_ray.loop import Loop, LoopResult, Progress, Round
from kka_ray.prepare import Prepared, prepare
from kka_ray.records import Description, Rendering, Verdict, to_table
from kka_ray.store import Store

_NEEDED_BYTES = 500_000_000


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder and its summary."""

    folder: Path
    summary: dict[str, Any]


def run(
    config: RunConfig,
    progress: Progress,
    say: Callable[[str], None],
    *,
    verbose: bool = False,
    parent: str | None = None,
) -> Finished:
    """Runs a configuration to its end.

    `say` hears of what a user should read at once (warnings). `parent` is an MLflow run that this one belongs to.
    Raises KkaError for what a user can mend.
    """
    started = time.perf_counter()
    config = absolute(config)
    folder = Path(config.output) / config.name
    claim(folder, config)
    store = Store(config.store.uri)
    _check_room(store)
    with session(config.cluster, verbose=verbose):
        make_plan(config).check(nodes())
        prepared = prepare(config, store)
        for warning in warnings(config, prepared):
            say(warning)
        loop = Loop(config, store, prepared, progress)
        try:
            result = loop.run()
        finally:
            loop.close()
        evaluation = evaluate(config, store, prepared, result, progress)
    tuned = headline_detector(config, store, prepared, evaluation)
    summary = summarise(config, prepared, result, evaluation, loop.budget)
    summary["drawn_normals"] = artefacts(tuned, prepared.validation, result.normals.features)
    _write_records(folder / "records", prepared, result, evaluation, tuned)
    tuned.save(folder / "detector")
    write_json(folder / "references.json", sorted(store.used))
    summary["wall_seconds"] = round(time.perf_counter() - started, 1)
    write_json(folder / "summary.json", summary)

    from kka_ray.report import write_report

    write_report(folder)
    tracking.log_run(config, summary, folder, parent)
    return Finished(folder, summary)


def claim(folder: Path, config: RunConfig) -> None:
    """Makes the run's folder and writes its configuration. Raises ConfigError if another run lives there."""
    file, text = folder / "config.yaml", dump(config)
    if file.is_file() and file.read_text() != text:
        raise ConfigError(
            f"{folder} holds a run with another configuration. Give this one another name (-o name=NAME), or remove "
            f"the folder; what both have in common stays in the store"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError as error:
        raise ResourceError(f"cannot write the run's folder {folder}: {error}") from error


def warnings(config: RunConfig, prepared: Prepared) -> list[str]:
    """What a user should know before the run goes on."""
    from kka_ray import assets
    from kka_ray.render.domain import domain_warning

    if not config.render.pipeline.startswith("builtin:"):
        return []
    weights = assets.resolve(config.render.pipeline).path
    found = domain_warning(prepared.train.pooled, prepared.backbone.identity, weights, prepared.data.subject)
    return [found] if found else []


def summarise(
    config: RunConfig, prepared: Prepared, result: LoopResult, evaluation: Evaluation, budget: int
) -> dict[str, Any]:
    """The run in numbers; docs/results.md says what each means."""
    described = sum(len(r.descriptions) for r in result.rounds)
    drawn = sum(len(r.drawn.ids) for r in result.rounds)
    kept = result.rounds[-1].kept
    headline = config.detect.headline
    summary: dict[str, Any] = {
        "name": config.name,
        "config_hash": config_hash(config),
        "versions": versions.all_versions(),
        "detector": headline,
        "auc": {arm: evaluation.summary(headline, arm) for arm in ("baseline", "zeroth", "kka")},
        "detectors": {
            d.kind: {a.name: s for a in evaluation.arms if (s := evaluation.summary(d.kind, a.name))}
            for d in config.detect.detectors
        },
        "normals": prepared.count,
        "dropped": prepared.normals.dropped,
        "test": {"normals": evaluation.test_normals, "anomalies": evaluation.test_anomalies},
        "budget": budget,
        "described_fraction": described / prepared.count,
        "drawn_fraction": drawn / prepared.count,
        "generated_fraction": len(kept) / prepared.count,
        "kept": dict(Counter(k.label for k in kept)),
        "rounds": [_round(r, result) for r in result.rounds],
        "audit": result.audit.diagnostics if result.audit else {},
        "evaluation": evaluation.to_json(),
    }
    if isinstance(config.describe.sampler, ApiSampler):
        summary["api"] = api_usage(result, config.describe.sampler)
    if isinstance(config.data, FlowersData):
        from kka_ray import truth

        summary["truth"] = truth.measure(result)
    return summary


def api_usage(result: LoopResult, sampler: ApiSampler) -> dict[str, float]:
    """What an API was asked for, over all rounds, and its `cost` in the currency of the configured prices.

    Counted is what was needed for this run's results, found in the store or not; answers that were lost are not.
    """
    from kka_ray.describe.api_sampler import cost

    usage: Counter[str] = Counter()
    for r in result.rounds:
        usage.update(r.usage)
    return {**usage, "cost": cost(usage, sampler)}


def artefacts(tuned: TunedDetector, validation: Features, drawn: Features) -> dict[str, Any]:
    """How the detector that is served takes normal captions that were drawn: it should take them for normal.

    `flagged`: the share of them called anomalous. `auc`: of them against the validation normals, 0.5 where being drawn
    makes no difference.
    """
    if len(drawn) == 0:
        return {"count": 0}
    scores = tuned.score(drawn)
    truth = np.r_[np.zeros(len(validation), bool), np.ones(len(drawn), bool)]
    both = np.r_[tuned.score(validation).score, scores.score]
    return {
        "count": len(drawn),
        "flagged": float(scores.anomalous.mean()),
        "auc": metrics(both, truth)["auc"],
    }


def _round(r: Round, result: LoopResult) -> dict[str, Any]:
    assert result.audit is not None
    labels = Counter(v.label for v in result.audit.verdicts if v.round == r.number)
    training = {k: r.dpo[k] for k in ("pairs", "steps", "loss_first", "loss_last", "margin")} if r.dpo else None
    return {
        "described": len(r.descriptions),
        "unique": len({raw.strip().lower() for _, raw in r.drawn.raw}),
        "rejected": dict(sorted(Counter(d.reason for d in r.descriptions if d.reason).items())),
        "rendered": len(r.drawn.ids),
        "failed": sum(x.status == "failed" for x in r.drawn.renderings),
        "mismatched": len(r.drawn.mismatched),
        "hard": labels["hard"],
        "between": labels["between"],
        "easy": labels["easy"],
        "normal_like": labels["normal_like"],
        "hard_rate": labels["hard"] / max(len(r.descriptions), 1),
        "normal_class_rate": sum(d.reason == "normal_class" for d in r.descriptions) / max(len(r.descriptions), 1),
        "diversity": r.diversity,
        "unique_share": r.unique_share,
        "distinct_2": r.distinct_2,
        "perplexity": r.perplexity,
        "usage": r.usage,
        "kept": len(r.kept),
        "status": r.status,
        "seconds": r.seconds | {f"{k}_work": round(v, 2) for k, v in r.drawn.seconds.items()},
        "dpo": training,
    }


def _write_records(
    folder: Path, prepared: Prepared, result: LoopResult, evaluation: Evaluation, tuned: TunedDetector
) -> None:
    """Everything that the report shows, as Parquet tables that pandas reads."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_table(folder / "descriptions", to_table(Description, [d for r in result.rounds for d in r.descriptions]))
    drawn = [x for r in result.rounds for x in r.drawn.renderings]
    _write_table(folder / "renderings", to_table(Rendering, drawn))
    _write_table(folder / "drawn_normals", to_table(Rendering, result.normals.renderings))
    audit = result.audit
    assert audit is not None
    _write_table(folder / "verdicts", to_table(Verdict, audit.verdicts))
    kept = [{"set": f"round-{r.number}", **asdict(k)} for r in result.rounds for k in r.kept]
    _write_table(folder / "kept", pa.Table.from_pylist(kept))
    _write_table(folder / "normal_hardness", pa.table({"hardness": audit.validation_hardness.astype(np.float64)}))
    latent = audit.latent
    rows = []
    for part, before, after in (
        ("normal", latent.normals_before, latent.normals_after),
        ("drawn", latent.drawn_before, latent.drawn_after),
    ):
        labels = [v.label for v in audit.verdicts] if part == "drawn" else ["normal"] * len(before)
        for label, b, a in zip(labels, before.tolist(), after.tolist(), strict=True):
            rows.append({"label": label, "x_before": b[0], "y_before": b[1], "x_after": a[0], "y_after": a[1]})
    _write_table(folder / "latent", pa.Table.from_pylist(rows))
    history = [{"round": r.number, **row} for r in result.rounds if r.dpo for row in r.dpo["history"]]
    _write_table(folder / "dpo", pa.Table.from_pylist(history))
    _write_table(folder / "evaluation", pa.Table.from_pylist(evaluation.to_json()))
    images = prepared.normals.validation
    scores = tuned.score(prepared.validation)
    most = review(images, scores.score, 24)
    _write_table(
        folder / "review",
        pa.table(
            {
                "id": [images.ids[i] for i in most],
                "image": [encode_png(images.images[i]) for i in most],
                "score": [float(scores.score[i]) for i in most],
                "anomalous": [bool(scores.anomalous[i]) for i in most],
            }
        ),
    )


def absolute(config: RunConfig) -> RunConfig:
    """Local paths made absolute: the workers' current folder is another."""
    uri = config.store.uri
    uri = uri if "://" in uri else str(Path(uri).resolve())
    return config.model_copy(
        update={"store": config.store.model_copy(update={"uri": uri}), "output": str(Path(config.output).resolve())}
    )


def _check_room(store: Store) -> None:
    free = store.free_bytes()
    if free is not None and free < _NEEDED_BYTES:
        raise ResourceError(
            f"only {free / 1e6:.0f} MB are free for the store {store.uri}; a run needs {_NEEDED_BYTES / 1e6:.0f} MB. "
            "Free some room (`kka gc`) or move it with -o store.uri=..."
        )


def _write_table(path: Path, table: pa.Table) -> None:
    temporary = path.with_suffix(".partial")
    pq.write_table(table, temporary, compression="zstd")
    temporary.rename(path.with_suffix(".parquet"))
