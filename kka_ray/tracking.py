"""MLflow: a run of ours with its rounds as child runs; parameters once, metrics a round, the report as artifact."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kka_ray.config.models import RunConfig
from kka_ray.errors import ResourceError
from kka_ray.files import absolute_path

# Before MLflow is imported: a run sends nothing to anybody.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_log = logging.getLogger(__name__)

SQLITE = "sqlite:///"
"""How the URI of a SQLite file begins."""


_METRICS, _PARAMS = 500, 100
"""At most in one request: MLflow takes 1,000 and 100."""
_QUICK = "2"
"""Retries of a request that only asks whether a server is there; MLflow's own number takes minutes."""


def default_uri(output: Path) -> str:
    """A SQLite file beside the runs, for one machine only."""
    return f"{SQLITE}{output.resolve() / 'mlflow.db'}"


def absolute(uri: str) -> str:
    """A tracking URI, the path of a SQLite file made absolute."""
    return f"{SQLITE}{absolute_path(uri.removeprefix(SQLITE))}" if uri.startswith(SQLITE) else uri


def tracking_uri(config: RunConfig) -> str:
    """Where the results of a run are tracked."""
    return config.tracking.uri or default_uri(Path(config.output))


def check(config: RunConfig) -> None:
    """Raises ResourceError if the tracking store cannot be reached or would not take the run: better now than after it.

    A SQLite file that is not there yet is not made.
    """
    uri = tracking_uri(config)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        return
    retries = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(retries)
    os.environ.setdefault(retries, _QUICK)
    try:
        with _reaching(uri):
            _experiment(_client(uri), config.tracking.experiment, uri)
    finally:
        if before is None:
            del os.environ[retries]


@contextmanager
def _reaching(uri: str) -> Iterator[None]:
    """What goes wrong with a tracking store becomes a ResourceError that names it."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        text = " ".join(str(error).split())[:300]
        raise ResourceError(
            f"MLflow at {uri} does not take the results (tracking.uri): {type(error).__name__}: "
            f"{text}. Start it, or track elsewhere with -o tracking.uri=URI"
        ) from error


@contextmanager
def unless_unreachable() -> Iterator[None]:
    """What a tracking store does not take within the block is a warning in the log: work of hours tells of itself
    elsewhere as well, and is not to end for it."""
    try:
        yield
    except ResourceError as error:
        _log.warning("%s", error)


def log_run(config: RunConfig, summary: Mapping[str, Any], folder: Path, parent: str | None = None) -> str:
    """Writes a finished run and its rounds; returns the id of the MLflow run.

    `parent` is the id of the run that this one belongs to, as in a sweep. The client is used, not the global active
    run, so that several runs can be written by one process. Raises ResourceError if the store does not take it.
    """
    uri = tracking_uri(config)
    with _reaching(uri):
        return _log_run(uri, config, summary, folder, parent)


def _log_run(uri: str, config: RunConfig, summary: Mapping[str, Any], folder: Path, parent: str | None) -> str:
    client = _client(uri)
    experiment = _experiment(client, config.tracking.experiment, uri)
    tags = {"mlflow.runName": config.name, "kka.config_hash": str(summary["config_hash"])}
    if parent:
        tags["mlflow.parentRunId"] = parent
    run = client.create_run(experiment, tags=tags).info.run_id
    of_run = {k: v for k, v in summary.items() if k not in ("rounds", "versions", "evaluation")}
    _log_all(client, run, _numbers(of_run), params=flatten(config.model_dump(mode="json")))
    for number, row in enumerate(summary["rounds"]):
        child = client.create_run(
            experiment, tags={"mlflow.runName": f"{config.name}/round-{number}", "mlflow.parentRunId": run}
        ).info.run_id
        numbers = _numbers(row)
        _log_all(client, child, numbers)
        _log_all(client, run, {f"round/{name}": value for name, value in numbers.items()}, step=number)
        client.set_terminated(child)
    for name in ("summary.json", "config.yaml", "report.html"):
        if (folder / name).is_file():
            client.log_artifact(run, str(folder / name))
    client.set_terminated(run)
    return str(run)


def start_run(uri: str, experiment: str, name: str, params: Mapping[str, Any], *, parent: str | None = None) -> str:
    """Opens an MLflow run and returns its id; `parent` is the run that it belongs to.

    `uri` is given and not looked up, since a worker process knows nothing of its driver's tracking server. Raises
    ResourceError if the store does not take it.
    """
    with _reaching(uri):
        client = _client(uri)
        experiment_id = _experiment(client, experiment, uri)
        tags = {"mlflow.runName": name} | ({"mlflow.parentRunId": parent} if parent else {})
        run = client.create_run(experiment_id, tags=tags).info.run_id
        _log_all(client, run, {}, params=params.items())
    return str(run)


def log_metrics(uri: str, run: str, metrics: Mapping[str, float], step: int) -> None:
    """Adds metrics at a step to an open run. Raises ResourceError if the store does not take them."""
    with _reaching(uri):
        _log_all(_client(uri), run, metrics, step=step)


def log_artifact(uri: str, run: str, file: Path, folder: str) -> None:
    """Adds a file to an open run, under `folder`. Raises ResourceError if the store does not take it."""
    with _reaching(uri):
        _client(uri).log_artifact(run, str(file), folder)


def end_run(
    uri: str, run: str, metrics: Mapping[str, float], *, failed: bool = False, artifacts: Sequence[Path] = ()
) -> None:
    """Writes a run's metrics and artifacts and closes it. Raises ResourceError if the store does not take them."""
    with _reaching(uri):
        client = _client(uri)
        _log_all(client, run, metrics)
        for path in artifacts:
            client.log_artifact(run, str(path))
        client.set_terminated(run, "FAILED" if failed else "FINISHED")


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in flatten(values) if isinstance(v, int | float) and not isinstance(v, bool)}


def _log_all(
    client: Any, run: str, metrics: Mapping[str, float], *, params: Iterable[tuple[str, Any]] = (), step: int = 0
) -> None:
    """Metrics and parameters in few requests: a server is far away, and there are hundreds."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    rows = [Metric(name, float(value), now, step) for name, value in metrics.items()]
    given = [Param(name, str(value)[:500]) for name, value in params]
    for start in range(0, len(rows), _METRICS):
        client.log_batch(run, metrics=rows[start : start + _METRICS])
    for start in range(0, len(given), _PARAMS):
        client.log_batch(run, params=given[start : start + _PARAMS])


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of nested mappings; lists are left out of metrics by having their index as name."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from flatten(item, f"{name}.{i}.")
                else:
                    yield f"{name}.{i}", item
        else:
            yield name, value


def _client(uri: str) -> Any:
    # Imported late: it takes seconds.
    from mlflow import MlflowClient

    # That it makes its tables is of no interest amid a run's own lines.
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    folder = _folder(uri)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    return MlflowClient(uri)


def _folder(uri: str) -> Path | None:
    """Of a SQLite file; None for a server."""
    return Path(uri.removeprefix(SQLITE)).resolve().parent if uri.startswith(SQLITE) else None


def _experiment(client: Any, name: str, uri: str) -> str:
    """The id of an experiment. The artifacts of a new one in a SQLite file go beside the file: MLflow would put them
    into the current folder.

    Raises ResourceError if it was deleted: MLflow keeps its name, and takes no runs.
    """
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        command = f"mlflow experiments restore --experiment-id {found.experiment_id}"
        raise ResourceError(
            f"the experiment {name!r} in MLflow at {uri} was deleted, and takes no runs. Restore it "
            f"(`MLFLOW_TRACKING_URI={shlex.quote(uri)} {command}`), or set tracking.experiment to another name"
        )
    if found is not None:
        return str(found.experiment_id)
    folder = _folder(uri)
    location = (folder / "mlartifacts").as_uri() if folder else None
    return str(client.create_experiment(name, artifact_location=location))
