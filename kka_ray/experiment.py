"""A whole run: normals in; the loop, the evaluation, and a folder with summary, records, detector and report out.

The same command run again after an interruption finishes the run: what is in the store is not made again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from kka_ray import assets, places, text_signal, tracking, versions
from kka_ray.amounts import amount
from kka_ray.cluster.plan import make_plan
from kka_ray.cluster.session import nodes, session
from kka_ray.cluster.streaming import Pools, Progress
from kka_ray.config import config_hash, dump, load
from kka_ray.config.models import ApiSampler, BackboneConfig, FlowersData, RunConfig
from kka_ray.data import open_data
from kka_ray.data.decode import encode_png
from kka_ray.detectors import outside
from kka_ray.detectors.tuned import Scores, TunedDetector
from kka_ray.errors import ConfigError, DataError, KkaError, ResourceError
from kka_ray.evaluation import Evaluation, evaluate, headline_detector, metrics, review, unseen_drawn_normals
from kka_ray.features.backbone import Backbone
from kka_ray.features.base import Features
from kka_ray.files import absolute_path, write_json, write_text, written
from kka_ray.loop import Loop, LoopResult, Round
from kka_ray.places import Place
from kka_ray.prepare import Prepared, extract_images, prepare
from kka_ray.records import Description, Rendering, Verdict, schema, to_table
from kka_ray.render.index import check_renderer
from kka_ray.store import Store

ANOTHER_NAME = (
    "Give this one another name (-o name=NAME), or remove the folder; what both have in common stays in the store"
)
"""What to do where a folder is another run's or sweep's."""

_NEEDED_BYTES = 500_000_000
_ROWS = 256  # images that are written at a time


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, a path or a URI, and its summary."""

    folder: str
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
    # Of what was written: the hash is not to change with the folder that relative paths begin at.
    hash_ = config_hash(config)
    config = absolute(config)
    with places.opened(places.below(config.output, config.name), "config.yaml", "config_hash", "sweep.yaml") as place:
        summary = _run(config, hash_, place, progress, say, verbose=verbose, parent=parent)
        return Finished(place.name, summary)


def _run(
    config: RunConfig,
    hash_: str,
    place: Place,
    progress: Progress,
    say: Callable[[str], None],
    *,
    verbose: bool,
    parent: str | None,
) -> dict[str, Any]:
    started = time.perf_counter()
    check_libraries(config)
    check_renderer(config.render)
    check_outside(config, 1)
    open_data(config.data, config.seed).look()
    store = Store(config.store.uri)
    check_room(store)
    tracking.check(config)
    new = not (place.here / "config.yaml").is_file()
    hash_ = claim(place, config, hash_)
    with (
        disclaiming(place, "config.yaml", "config_hash", new=new) as unbegun,
        session(config.cluster, verbose=verbose),
        computing(config.cluster.driver_threads),
        ExitStack() as stack,
    ):
        make_plan(config).check(nodes())
        with closing(Pools(config, store.uri)) as pools:
            pools.open()  # their models are loaded while the normals are read
            progress("prepare", -1, 0, 1)
            prepared = prepare(config, store)
            progress("prepare", -1, 1, 1)
            for warning in warnings(config, store, prepared):
                say(warning)
            loop = stack.enter_context(closing(Loop(config, store, prepared, progress, pools, ahead=True)))
            check_outside(config, loop.budget)
            unbegun.pop_all()
            result = loop.run()
        evaluation = evaluate(config, store, prepared, result, progress, loop.take_ahead)
        tuned = headline_detector(config, store, prepared, evaluation)
        validation = tuned.score(prepared.validation)
        summary = summarise(config, hash_, prepared, result, evaluation, loop.budget)
        # By the paper's rule a round's labels, and so the pairs, are others than the auditor's.
        rejected = config.preference.rejected if config.confusion.rule == "band" else ()
        summary["text_signal"] = text_signal.measure(result, loop.encoder, rejected)
        summary["drawn_normals"] = artefacts(tuned, validation, unseen_drawn_normals(config, result))
    summary["threshold"] = tuned.calibration.threshold
    summary["validation_flagged"] = float(validation.anomalous.mean())
    summary["validation_normals"] = len(validation)
    summary["false_positive_rate"] = tuned.calibration.false_positive_rate
    for notice in skipped(prepared, place.name):
        say(notice)

    from kka_ray.report import write_report

    folder = place.here
    with writing(place.name):
        _write_records(folder / "records", prepared, result, evaluation, validation)
        tuned.save(folder / "detector")
        write_json(folder / "references.json", sorted(store.used))
        summary["wall_seconds"] = round(time.perf_counter() - started, 1)
        write_json(folder / "summary.json", summary)
        write_report(folder)
    place.keep("references.json", "summary.json")
    try:
        tracking.log_run(config, summary, folder, parent)
    except ResourceError as error:
        raise ResourceError(
            f"the run is complete ({place.name}), but {error}. The same command again finds all of it in the store and "
            "tracks it"
        ) from error
    return summary


def claim(place: Place, config: RunConfig, hash_: str) -> str:
    """Makes the run's folder and writes its configuration, whose paths are absolute, and the hash `hash_`.

    Returns the hash that the run has: the one it was first begun with, as a run that is gone on with from its folder
    has its paths written otherwise. The same run may be done elsewhere, in other places of the cluster and with another
    store. What an earlier end of it refers to goes: until the next end it may refer to anything in the store. Raises
    ConfigError if a sweep or a run with other results lives there, ResourceError if the folder cannot be written.
    """
    file, hashed = place.here / "config.yaml", place.here / "config_hash"
    if (place.here / "sweep.yaml").is_file():
        raise ConfigError(f"{place.name} holds a sweep; give the run another name (-o name=NAME)")
    if file.is_file():
        _check_same(place, config)
    with writing(place.name):
        place.here.mkdir(parents=True, exist_ok=True)
        if file.is_file() and hashed.is_file():
            hash_ = hashed.read_text().strip()
        else:
            write_text(hashed, hash_ + "\n")
        write_text(file, dump(config))
        place.remove("references.json")
    place.keep("config.yaml")  # last: without it the hash counts for nothing
    return hash_


@contextmanager
def disclaiming(place: Place, *files: str, new: bool) -> Iterator[ExitStack]:
    """Undoes the claim of a new run or sweep, the files that it wrote, if the block ends with a KkaError before what is
    yielded is emptied with `pop_all`: with a setting mended, its name is free."""

    def disclaim(_: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, KkaError):
            return
        for file in files:
            place.remove(file)
        with suppress(OSError):  # something else lies there
            place.here.rmdir()

    with ExitStack() as unbegun:
        if new:
            unbegun.push(disclaim)
        yield unbegun


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """Within the block torch and BLAS compute with so many threads, whatever there are: results depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """What is written into a run's folder within the block fails as ResourceError, as on a full disk."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot write the run's folder {folder}: {error}. Free some room there, then run the same command again: "
            "finished stages are not repeated"
        ) from error


def _check_same(place: Place, config: RunConfig) -> None:
    """Raises ConfigError unless the configuration of the run there is one that has the same results."""
    try:
        there, ours = _deciding(absolute(load(place.here / "config.yaml", RunConfig))), _deciding(config)
    except ConfigError as error:
        raise ConfigError(f"{place.name} holds a run that cannot be gone on with. {ANOTHER_NAME}.\n{error}") from error
    if differing := differences(there, ours):
        raise ConfigError(
            f"{place.name} holds a run with another configuration ({', '.join(differing)}). {ANOTHER_NAME}"
        )


def differences(there: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """The names under which two configurations, by dotted name, do not say the same."""
    absent = object()  # not null: that may be another value than the default
    return sorted(name for name in there.keys() | ours.keys() if there.get(name, absent) != ours.get(name, absent))


def _deciding(config: RunConfig) -> dict[str, Any]:
    """What results depend on, by dotted name."""
    incidental = {f"describe.sampler.{name}" for name in config.describe.sampler.INCIDENTAL}
    values = config.model_dump(mode="json", exclude={"cluster", "store", "tracking", "output"})
    return {name: value for name, value in tracking.flatten(values) if name not in incidental}


def warnings(config: RunConfig, store: Store, prepared: Prepared) -> list[str]:
    """What a user should know before the run goes on."""
    from kka_ray.render.domain import SAMPLE, domain_warning, load_reference

    name = config.render.pipeline
    # The pipelines of the hub have none.
    reference = None if name.startswith("hub:") else load_reference(assets.resolve(name).path)
    if reference is None:
        return []
    # Not the run's own features: it may look at the images at another size, or with another backbone.
    backbone = Backbone.load(BackboneConfig(image_size=reference.image_size))
    if backbone.identity != reference.backbone:
        return [
            f"the renderer {name} was not checked against {prepared.data.subject}: its reference is of a backbone "
            "that is not here"
        ]
    shown = extract_images(store, backbone, prepared.normals.train.images[:SAMPLE], patches=False)
    found = domain_warning(shown.pooled, reference, name, prepared.data.subject)
    return [found] if found else []


def summarise(
    config: RunConfig, hash_: str, prepared: Prepared, result: LoopResult, evaluation: Evaluation, budget: int
) -> dict[str, Any]:
    """The run in numbers; docs/run_folder.md says what each means. `hash_` is that of the configuration as written."""
    described = sum(len(r.descriptions) for r in result.rounds)
    drawn = sum(len(r.drawn.ids) for r in result.rounds)
    kept = result.rounds[-1].kept
    headline = config.detect.headline
    summary: dict[str, Any] = {
        "name": config.name,
        "config_hash": hash_,
        "versions": versions.all_versions(),
        "detector": headline,
        "views": config.detect.views,
        "auc": {arm: evaluation.summary(headline, arm) for arm in ("baseline", "zeroth", "kka")},
        "detectors": {
            d.kind: {a.name: s for a in evaluation.arms if (s := evaluation.summary(d.kind, a.name))}
            for d in config.detect.detectors
        },
        "normals": prepared.count,
        "dropped": prepared.normals.dropped,
        "test": {
            "normals": evaluation.test_normals,
            "anomalies": evaluation.test_anomalies,
            "dropped": dict(prepared.data.test_dropped),
        },
        "budget": budget,
        "budget_rule": "share" if budget > config.loop.min_budget else "min_budget",
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


def artefacts(tuned: TunedDetector, validation: Scores, drawn: Features) -> dict[str, Any]:
    """How the detector that is served takes normal captions that were drawn: it should take them for normal.

    `flagged`: the share of them called anomalous. `auc`: of them against the validation normals, 0.5 where being drawn
    makes no difference.
    """
    if len(drawn) == 0:
        return {"count": 0}
    scores = tuned.score(drawn)
    truth = np.r_[np.zeros(len(validation), bool), np.ones(len(drawn), bool)]
    both = np.r_[validation.score, scores.score]
    return {
        "count": len(drawn),
        "flagged": float(scores.anomalous.mean()),
        "auc": metrics(both, truth)["auc"],
    }


def skipped(prepared: Prepared, folder: str) -> list[str]:
    """What a user should read of files that could not be used."""
    files = prepared.data.skipped
    if not files:
        return []
    name, reason = files[0]
    return [
        f"left out: {amount(len(files), 'file')} that cannot be used, the first of them {name} ({reason}); "
        f"{places.below(folder, 'records/skipped.parquet')} lists them"
    ]


def _round(r: Round, result: LoopResult) -> dict[str, Any]:
    assert result.audit is not None
    labels = Counter(v.label for v in result.audit.verdicts if v.round == r.number)
    written = sum(not d.reason.startswith("error") for d in r.descriptions)
    training = {k: r.dpo[k] for k in ("pairs", "steps", "loss_first", "loss_last", "margin")} if r.dpo else None
    return {
        "described": len(r.descriptions),
        "unique": len({raw.strip().lower() for _, raw in r.drawn.raw}),
        # What an error said is in its row: free text makes no name to count or to track under.
        "rejected": dict(sorted(Counter(d.reason.partition(":")[0] for d in r.descriptions if d.reason).items())),
        "rendered": len(r.drawn.ids),
        "failed": sum(x.status == "failed" for x in r.drawn.renderings),
        "mismatched": len(r.drawn.mismatched),
        "hard": labels["hard"],
        "between": labels["between"],
        "easy": labels["easy"],
        "normal_like": labels["normal_like"],
        "hard_rate": labels["hard"] / max(written, 1),
        "normal_class_rate": sum(d.reason == "normal_class" for d in r.descriptions) / max(written, 1),
        "diversity": r.diversity,
        "unique_share": r.unique_share,
        "distinct_2": r.distinct_2,
        "perplexity": r.perplexity,
        "unscored": r.unscored,
        "usage": r.usage,
        "kept": len(r.kept),
        "status": r.status,
        "seconds": r.seconds | {f"{k}_work": round(v, 2) for k, v in r.drawn.seconds.items()},
        "dpo": training,
        "evaluator": r.diagnostics,
    }


def _write_records(
    folder: Path, prepared: Prepared, result: LoopResult, evaluation: Evaluation, scores: Scores
) -> None:
    """Everything that the report shows, as Parquet tables that pandas reads. `scores` are the validation normals'."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_table(folder / "descriptions", to_table(Description, [d for r in result.rounds for d in r.descriptions]))
    _write_renderings(folder / "renderings", [r.drawn.renderings for r in result.rounds])
    _write_renderings(folder / "drawn_normals", [result.normals.renderings])
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
    most = review(scores.score, 24)
    names, reasons = zip(*prepared.data.skipped, strict=True) if prepared.data.skipped else ((), ())
    _write_table(
        folder / "skipped",
        pa.table({"file": pa.array(names, pa.string()), "reason": pa.array(reasons, pa.string())}),
    )
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
    """Every relative path made absolute: the current folder of workers and trials is another.

    `data.captions` stays as it is, being relative to `data.path`.
    """
    data, sampler, outside = config.data, config.describe.sampler, config.detect.outside
    if not isinstance(data, FlowersData):
        data = data.model_copy(update={"path": _from_root(data.path)})
    if not isinstance(sampler, ApiSampler):
        sampler = sampler.model_copy(update={"model": assets.absolute(sampler.model)})
    uri = config.store.uri
    changed: dict[str, dict[str, Any]] = {
        "backbone": {"model": assets.absolute(config.backbone.model)},
        "describe": {"sampler": sampler},
        "render": {"pipeline": assets.absolute(config.render.pipeline)},
        "detect": {"outside": outside and _from_root(outside)},
        "tracking": {"uri": config.tracking.uri and tracking.absolute(config.tracking.uri)},
        "store": {"uri": _from_root(uri)},
    }
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changed.items()}
    return config.model_copy(update={**sections, "data": data, "output": _from_root(config.output)})


def _from_root(path: str) -> str:
    """A path made absolute; a URI stays."""
    return path if places.is_uri(path) else absolute_path(path)


def check_libraries(config: RunConfig) -> None:
    """Raises ConfigError if a library is missing that is first used when half of the run is done.

    Where Ray installs packages for the training alone, nothing is known of them here.
    """
    wanted = config.loop.rounds and config.preference.load_in_4bit and not config.cluster.train_runtime_env.pip
    if wanted and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "preference.load_in_4bit needs bitsandbytes, which is not installed here: pip install -e '.[quantised]', "
            "or train on the whole model with -o preference.load_in_4bit=false"
        )


def check_outside(config: RunConfig, count: int) -> None:
    """Raises DataError if so many images cannot be drawn from `detect.outside`, which is not done before the end."""
    folder = config.detect.outside
    if folder is None or "outside" not in config.detect.controls:
        return
    try:
        outside.draw(folder, count, config.seed)
    except DataError as error:
        raise DataError(f"detect.outside: {error}. Or leave outside out of detect.controls") from error


def check_room(store: Store) -> None:
    """Raises ResourceError if the store has less room than any run takes."""
    free = store.free_bytes()
    if free is not None and free < _NEEDED_BYTES:
        raise ResourceError(
            f"only {free / 1e6:.0f} MB are free for the store {store.uri}; a run needs {_NEEDED_BYTES / 1e6:.0f} MB. "
            "Free some room (`kka gc`) or move it with -o store.uri=..."
        )


def _write_renderings(path: Path, rounds: Iterable[Sequence[Rendering]]) -> None:
    """The images of rounds, some at a time: a table of all of them would be in memory several times."""
    with (
        written(path.with_suffix(".parquet")) as temporary,
        pq.ParquetWriter(temporary, schema(Rendering), compression="zstd") as writer,
    ):
        for rows in rounds:
            for start in range(0, len(rows), _ROWS):
                writer.write_table(to_table(Rendering, rows[start : start + _ROWS]))


def _write_table(path: Path, table: pa.Table) -> None:
    with written(path.with_suffix(".parquet")) as temporary:
        pq.write_table(table, temporary, compression="zstd")
