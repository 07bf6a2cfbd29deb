"""Ray Tune on top of the loop: trials that share every stage they have in common, and one test of the best.

A trial is a function trainable that runs the loop and measures `kka_ray.objective`; it opens no test file. Its
placement group holds its own process and its pools, so that all of them end with it, whatever ends it; Ray Train makes
a placement group of its own within a trial. The same command again finds in the store what was finished.
"""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import kka_ray.cluster  # noqa: F401  sets what Ray reads from the environment, before Ray is imported

# isort: split
from ray import tune
from rich import box
from rich.console import Console
from rich.table import Table

from kka_ray import places, tracking
from kka_ray.amounts import amount
from kka_ray.cluster import leases
from kka_ray.cluster.budget import BudgetError
from kka_ray.cluster.placement import bundles
from kka_ray.cluster.plan import TRIAL_CPUS, plan_of_sweep
from kka_ray.cluster.session import nodes, session
from kka_ray.cluster.streaming import Pools, Progress
from kka_ray.config import dump, load
from kka_ray.config.models import RunConfig
from kka_ray.config.sweep import Sweep, SweepConfig, Trial, champion_config, short
from kka_ray.data import open_data
from kka_ray.errors import ConfigError, KkaError, ResourceError, StageError, StoreError
from kka_ray.experiment import (
    ANOTHER_NAME,
    absolute,
    check_libraries,
    check_outside,
    check_room,
    computing,
    differences,
    disclaiming,
    warnings,
    writing,
)
from kka_ray.experiment import run as run_experiment
from kka_ray.files import write_json, write_text
from kka_ray.loop import Loop, LoopResult, budget
from kka_ray.objective import Reference, make_reference, validation_auc
from kka_ray.places import Place
from kka_ray.prepare import Prepared, prepare
from kka_ray.render.index import check_renderer
from kka_ray.store import Store

_RETRIES = 1  # of a trial whose process died; an error of ours is not tried again


@dataclass(frozen=True)
class Outcome:
    """What came of a trial. `objective` is the mean over seeds, None where the trial failed and `error` says why."""

    number: int
    parameters: dict[str, Any]
    objective: float | None = None
    per_seed: list[float] = field(default_factory=list)
    seconds: float = 0.0
    made: dict[str, int] = field(default_factory=dict)
    """Outputs by stage that were not in the store when the trial began."""
    found: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    rounds: list[str] = field(default_factory=list)
    """Each round's status."""
    outputs: list[list[str]] = field(default_factory=list)
    mlflow: str | None = None
    error: str | None = None
    interrupted: bool = False
    """Whether it failed for a fault of the storage or the cluster: the same command may come to its end."""


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep. `champion` is the summary of the best configuration's own run, where that was asked for."""

    folder: str
    """A path or a URI."""
    outcomes: list[Outcome]
    best: Outcome
    reference: tuple[str, ...]
    champion: dict[str, Any] | None
    wall_seconds: float


@dataclass(frozen=True)
class _Job:
    """What every trial is told."""

    trials: tuple[Trial, ...]
    """Their paths are absolute."""
    reference: Reference
    tracking_uri: str
    experiment: str
    parent: str


def run(
    sweep: Sweep, progress: Progress, say: Callable[[str], None], note: Callable[[str], None], *, verbose: bool = False
) -> SweepResult:
    """Runs a sweep to its end; `say` hears warnings, `note` a line a finished trial.

    A failed trial is a row with its error; the others go on. Raises StageError if every trial failed, ResourceError
    after the last one if the storage or the cluster let one down, and KkaError for what a user can mend. The test
    images are for the champion of trials that all had their chance.
    """
    base = absolute(sweep.base)
    with places.opened(places.below(base.output, sweep.config.name), "config.yaml", "sweep.yaml") as place:
        return _run(sweep, base, place, progress, say, note, verbose=verbose)


def _run(
    sweep: Sweep,
    base: RunConfig,
    place: Place,
    progress: Progress,
    say: Callable[[str], None],
    note: Callable[[str], None],
    *,
    verbose: bool,
) -> SweepResult:
    started = time.perf_counter()
    # A trial's process has another current folder, so its paths are resolved here.
    trials = tuple(replace(t, config=absolute(t.config)) for t in sweep.trials)
    # The best trial's own run is the last thing that is done, and any may be the best.
    champions = [t.config for t in trials] if sweep.config.champion_evaluation else []
    for trial in trials:
        check_libraries(trial.config)
        check_renderer(trial.config.render)
    _check_outside(champions)
    open_data(base.data, base.seed).look()
    store = Store(base.store.uri)
    check_room(store)
    tracking.check(base)
    uri = tracking.tracking_uri(base)
    new = not (place.here / "sweep.yaml").is_file()
    _claim(place, sweep.config)
    with (
        disclaiming(place, "sweep.yaml", new=new) as unbegun,
        session(base.cluster, verbose=verbose),
        computing(base.cluster.driver_threads),
    ):
        plan_of_sweep(sweep).check(nodes())
        # Held until the end of the block: the ledger lives as long as its handle.
        ledger = leases.start() if sweep.config.concurrency > 1 else None
        prepared = prepare(base, store)
        _check_outside(champions, prepared)
        for config in {t.config.render.pipeline: t.config for t in trials}.values():
            for warning in warnings(config, store, prepared):
                say(warning)
        try:
            reference = make_reference(base, store, prepared, progress)
        except (ResourceError, BudgetError):
            unbegun.pop_all()  # the same command goes on: until then `kka gc` is to spare what was made
            raise
        note(
            f"reference: {amount(len(reference.ids), 'drawn anomaly', 'drawn anomalies')} and "
            f"{amount(len(reference.normals), 'drawn normal')}, the same in {amount(len(sweep.trials), 'trial')}"
        )
        params = {"trials": len(sweep.trials), "seed": sweep.config.seed, "objective": sweep.config.objective}
        unbegun.pop_all()
        parent = tracking.start_run(uri, base.tracking.experiment, sweep.config.name, params)
        job = _Job(trials, reference, uri, base.tracking.experiment, parent)
        try:
            outcomes = run_trials(run_trial, job, sweep, note)
            result = SweepResult(place.name, outcomes, best_of(outcomes), reference.ids, None, _since(started))
            # As it was written: its name is not to change with the folder that the sweep is started in.
            chosen = champion_config(sweep, sweep.trials[result.best.number])
            _write(place, result, sweep, chosen, store.used)
            if broken := [o for o in outcomes if o.interrupted]:
                raise ResourceError(
                    f"{amount(len(broken), 'trial')} of {len(outcomes)} did not come to an end, trial "
                    f"{broken[0].number}: {broken[0].error}. The same command goes on; until then there is no champion"
                )
            if sweep.config.champion_evaluation:
                champion = run_experiment(chosen, progress, say, verbose=verbose, parent=parent).summary
                result = replace(result, champion=champion, wall_seconds=_since(started))
                _write(place, result, sweep, chosen, store.used)
        except BaseException:
            with tracking.unless_unreachable():
                tracking.end_run(uri, parent, {}, failed=True)
            raise
        del ledger
    metrics = {sweep.config.objective: result.best.objective or 0.0, "seconds": result.wall_seconds}
    try:
        tracking.end_run(uri, parent, metrics, artifacts=[place.here / "sweep.json", place.here / "best.yaml"])
    except ResourceError as error:
        raise ResourceError(
            f"the sweep is complete ({place.name}), but {error}. The same command again finds all of it in the store "
            "and tracks it"
        ) from error
    return result


def _check_outside(configs: Iterable[RunConfig], prepared: Prepared | None = None) -> None:
    """Raises DataError if one of the runs would lack images for its control `outside`: as many as it keeps of so many
    normals, or any at all where these are not known yet."""
    wanted = {
        (config.detect.outside, budget(config.loop, prepared.count) if prepared else 1): config
        for config in configs
        if "outside" in config.detect.controls
    }
    for (_, count), config in wanted.items():
        check_outside(config, count)


def run_trials(
    function: Callable[[dict[str, Any], Any], None], job: Any, sweep: Sweep, note: Callable[[str], None]
) -> list[Outcome]:
    """Runs `function({"trial": number}, job)` for each trial on Ray Tune; outcomes in the order of trials.

    The function reports `{"outcome": {...}}` once, the fields of an `Outcome`. One that raises or whose process dies is
    tried again once, and is then an outcome with an error.
    """
    # Tune's own progress table, loggers and handling of Ctrl-C give way to ours.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # The new one prints where it keeps its state, whatever its verbosity; that folder is gone at the end.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    with tempfile.TemporaryDirectory(prefix="kka-tune-") as storage:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(function, job=job), _resources(sweep.base)),
            param_space={"trial": tune.grid_search([t.number for t in sweep.trials])},
            tune_config=tune.TuneConfig(max_concurrent_trials=sweep.config.concurrency),
            run_config=tune.RunConfig(
                # A name that was used before would load the old state.
                name=f"{sweep.config.name}-{uuid.uuid4().hex[:8]}",
                storage_path=storage,
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
                callbacks=[_Notes(sweep.trials, note)],
                verbose=0,
            ),
        )
        results = tuner.fit()
        outcomes = {}
        for result in results:
            trial = sweep.trials[result.config["trial"]]
            if result.error is None and result.metrics and "outcome" in result.metrics:
                outcomes[trial.number] = Outcome(**result.metrics["outcome"])
            else:
                reason = _reason(result.error)
                outcomes[trial.number] = Outcome(trial.number, dict(trial.overrides), error=reason)
    return [outcomes[t.number] for t in sweep.trials]


def run_trial(settings: dict[str, Any], job: _Job) -> None:
    """One trial, in a process of its own."""
    trial = job.trials[settings["trial"]]
    mlflow_run: str | None = None
    with tracking.unless_unreachable():
        mlflow_run = tracking.start_run(
            job.tracking_uri, job.experiment, trial.config.name, trial.overrides, parent=job.parent
        )
    try:
        # The champion's own run judges in the driver: with as many threads here, its stages are found in the store.
        with computing(trial.config.cluster.driver_threads):
            outcome = measure(trial, trial.config, job.reference, mlflow_run)
    except BaseException:
        _end(job, mlflow_run, {}, failed=True)
        raise
    tune.report({"outcome": asdict(outcome)})  # first: a trial that is done is not to be lost for its tracking
    metrics = {"seconds": outcome.seconds, "kept": float(outcome.kept)}
    if outcome.objective is not None:
        metrics["validation_auc"] = outcome.objective
    _end(job, mlflow_run, metrics, failed=outcome.error is not None)


def _end(job: _Job, mlflow_run: str | None, metrics: dict[str, float], *, failed: bool) -> None:
    """Closes a trial's MLflow run; there is none where MLflow could not be reached as the trial began."""
    if mlflow_run is not None:
        with tracking.unless_unreachable():
            tracking.end_run(job.tracking_uri, mlflow_run, metrics, failed=failed)


def measure(trial: Trial, config: RunConfig, reference: Reference, mlflow_run: str | None) -> Outcome:
    """Runs a trial's loop and measures its objective; an error that a user can mend becomes a failed outcome."""
    started = time.perf_counter()
    store = leases.open_store(config.store.uri)
    before = set(store.names())
    result: LoopResult | None = None
    aucs: list[float] = []
    error: str | None = None
    interrupted = False
    try:
        prepared = prepare(config, store)
        with closing(Pools(config, store.uri)) as pools:
            result = Loop(config, store, prepared, _quiet, pools, withheld=reference.withholds).run()
        aucs = validation_auc(config, store, prepared, result, reference)
    except KkaError as failure:
        error = f"{type(failure).__name__}: {failure}"
        interrupted = isinstance(failure, (ResourceError, StoreError, BudgetError))
    outputs = sorted(store.used)
    made, found = count_outputs(outputs, before)
    return Outcome(
        trial.number,
        dict(trial.overrides),
        fmean(aucs) if aucs else None,
        aucs,
        round(time.perf_counter() - started, 1),
        made,
        found,
        len(result.rounds[-1].kept) if result else 0,
        [r.status for r in result.rounds] if result else [],
        [list(o) for o in outputs],
        mlflow_run,
        error,
        interrupted,
    )


def count_outputs(
    outputs: Iterable[tuple[str, str]], before: set[tuple[str, str]]
) -> tuple[dict[str, int], dict[str, int]]:
    """Of (stage, key) pairs, how many by stage were not there before, and how many were."""
    made = Counter(stage for stage, key in outputs if (stage, key) not in before)
    found = Counter(stage for stage, key in outputs if (stage, key) in before)
    return dict(sorted(made.items())), dict(sorted(found.items()))


def best_of(outcomes: Iterable[Outcome]) -> Outcome:
    """The largest objective; of equals the first. Raises StageError if every trial failed."""
    rows = list(outcomes)
    done = [(o.objective, o) for o in rows if o.objective is not None]
    if not done:
        raise StageError(f"of {amount(len(rows), 'trial')} none came to its end; the first: {rows[0].error}")
    return max(done, key=lambda pair: pair[0])[1]


def to_json(result: SweepResult, sweep: Sweep) -> dict[str, Any]:
    """What `sweep.json` holds."""
    champion = result.champion
    trials = [{k: v for k, v in asdict(o).items() if k != "outputs"} for o in result.outcomes]
    return {
        "name": sweep.config.name,
        "objective": sweep.config.objective,
        "reference": list(result.reference),
        "trials": trials,
        "best": result.best.number,
        "champion": {k: champion[k] for k in ("name", "config_hash", "detector", "auc")} if champion else None,
        "wall_seconds": result.wall_seconds,
    }


def table(result: SweepResult, sweep: Sweep) -> Table:
    """The trials, the best marked."""
    title = f"{sweep.config.name}: {sweep.config.objective} of {amount(len(result.outcomes), 'trial')}"
    out = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("trial", *_headings(sweep.config.parameters), "objective", "seconds", "made", "found", "kept"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("status", no_wrap=True)
    for o in result.outcomes:
        mark = " *" if o.number == result.best.number else ""
        values = [short(o.parameters[name]) for name in sweep.config.parameters]
        score = "" if o.objective is None else f"{o.objective:.4f}{mark}"
        stalled = sum(s != "ok" for s in o.rounds)
        status = "failed" if o.error else f"{stalled} stalled" if stalled else "ok"
        out.add_row(
            str(o.number),
            *values,
            score,
            f"{o.seconds:.0f}",
            str(sum(o.made.values())),
            str(sum(o.found.values())),
            str(o.kept),
            status,
        )
    out.caption = "* the best; made and found count the outputs of stages"
    return out


def _headings(names: Iterable[str]) -> list[str]:
    """The last part of each dotted name, where no other name ends alike: a terminal is narrow."""
    full = list(names)
    last = [name.rpartition(".")[2] for name in full]
    return [short if last.count(short) == 1 else name for name, short in zip(full, last, strict=True)]


def show(result: SweepResult, sweep: Sweep, console: Console) -> None:
    """The trials, why some failed, the best configuration and what it is worth on the test images."""
    console.print(table(result, sweep))
    for o in result.outcomes:
        if o.error:
            console.print(f"trial {o.number} failed: {o.error}", highlight=False, markup=False, soft_wrap=True)
    values = ", ".join(f"{k}={short(v)}" for k, v in result.best.parameters.items())
    console.print(f"best: {values}", highlight=False, markup=False, soft_wrap=True)
    if result.champion and result.champion["auc"]["kka"]:
        auc = {arm: f"{s['mean']:.4f}" for arm, s in result.champion["auc"].items() if s}
        arms = ", ".join(f"{arm} {value}" for arm, value in auc.items())
        console.print(f"its test AUC ({result.champion['detector']}): {arms}", highlight=False)
    console.print(
        f"results: {places.below(result.folder, 'sweep.json')}", highlight=False, markup=False, soft_wrap=True
    )


class _Notes(tune.Callback):
    """Says a line as each trial ends."""

    def __init__(self, trials: tuple[Trial, ...], note: Callable[[str], None]) -> None:
        self._trials, self._note = trials, note

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks, to restore an experiment, which is never done here; a console cannot be."""
        return {"_trials": self._trials, "_note": _unheard}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "outcome" not in result:
            return
        outcome = Outcome(**result["outcome"])
        score = f"failed: {outcome.error}" if outcome.objective is None else f"{outcome.objective:.4f}"
        self._note(f"{self._head(trial)}: {score} in {outcome.seconds:.0f} s")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note(f"{self._head(trial)}: its process failed")

    def _head(self, trial: Any) -> str:
        return self._trials[trial.config["trial"]].label


def _resources(config: RunConfig) -> tune.PlacementGroupFactory:
    return tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS}, *(taken for _, taken in bundles(config.cluster))])


def _reason(error: Exception | None) -> str:
    if error is None:
        return "the trial ended without a result"
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _quiet(stage: str, round: int, done: int, total: int) -> None:
    """A trial shows no progress of its own."""


def _unheard(line: str) -> None:
    """Where nobody listens."""


def _claim(place: Place, config: SweepConfig) -> None:
    """Makes the sweep's folder and writes its configuration.

    What an earlier end of the sweep refers to goes: until the next end it may refer to anything in the store. Raises
    ConfigError if a run or another sweep lives there, ResourceError if the folder cannot be written.
    """
    if (place.here / "config.yaml").is_file():
        raise ConfigError(f"{place.name} holds a run; give the sweep another name (-o name=NAME)")
    file = place.here / "sweep.yaml"
    if file.is_file():
        _check_same(place, config)
    with writing(place.name):
        place.here.mkdir(parents=True, exist_ok=True)
        write_text(file, dump(config))
        place.remove("references.json")
    place.keep("sweep.yaml")


def _check_same(place: Place, config: SweepConfig) -> None:
    """Raises ConfigError unless the sweep there tries the same points, or fewer or more of the same."""
    try:
        there = _deciding(load(place.here / "sweep.yaml", SweepConfig))
    except ConfigError as error:
        raise ConfigError(
            f"{place.name} holds a sweep that cannot be gone on with. {ANOTHER_NAME}.\n{error}"
        ) from error
    if differing := differences(there, _deciding(config)):
        raise ConfigError(f"{place.name} holds another sweep ({', '.join(differing)}). {ANOTHER_NAME}")


def _deciding(config: SweepConfig) -> dict[str, Any]:
    """What the trials' results depend on, by dotted name: not how many there are, nor where they run."""
    values = config.model_dump(mode="json", include={"run", "parameters", "seed", "objective"})
    if isinstance(values["run"], dict):
        incidental = ("name", "cluster", "store", "tracking", "output")  # trials have names of their own
        values["run"] = {name: value for name, value in values["run"].items() if name not in incidental}
    return dict(tracking.flatten(values))


def _write(
    place: Place, result: SweepResult, sweep: Sweep, chosen: RunConfig, reference: Iterable[tuple[str, str]]
) -> None:
    """The results, the best configuration, and what the trials and their reference hold in the store, so that
    housekeeping spares it."""
    with writing(place.name):
        write_json(place.here / "sweep.json", to_json(result, sweep))
        write_text(place.here / "best.yaml", dump(chosen))
        outputs = {*reference, *((s, k) for o in result.outcomes for s, k in o.outputs)}
        write_json(place.here / "references.json", sorted(outputs))
    place.keep("references.json")


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)
