"""Runs and sweeps as Ray jobs: checked here, uploaded, followed to their end.

A Ray cluster runs whatever it is sent, so one that answers without a token is refused unless the user allows it. The
token is read from where Ray reads it and sent in a header; it is neither printed nor put into the job's environment,
which anyone with access to the dashboard can read.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import yaml
from aiohttp import ClientError
from rich.console import Console
from rich.markup import escape

from kka_ray import tracking
from kka_ray.config import RunConfig, load
from kka_ray.config.loading import extended, with_extended
from kka_ray.config.sweep import Trial, load_sweep
from kka_ray.errors import ConfigError, ResourceError

EXCLUDES = (
    "/data/",
    "/runs/",
    "/renderers/",
    "/scores/",
    "/.venv/",
    "/.venv-*/",
    "/.git/",
    "/build/",
    "/dist/",
    "__pycache__/",
    ".*_cache/",
    ".env",
    "*.token",
)
"""What of the repository is not uploaded: what is large, made again or may hold secrets. Folders of models are, for a
run may name one. `/data/` has its slash: `kka_ray/data` is source."""

VERBS = ("run", "sweep")
_WRITTEN = {
    "output": "a folder that the cluster's nodes share, or a URI",
    "store.uri": "a folder that the cluster's nodes share, or a URI",
    "tracking.uri": "a tracking server, or a file that the nodes share",
}
_SHARED = {"tracking.uri": f"{tracking.SQLITE}/shared/kka/mlflow.db"}
_PASSED_ON_HERE = ("KKA_CACHE",)
"""Variables that a job on this machine has of the user: they name folders of this machine."""
_NO_TOKEN = {"Authorization": "none"}
"""Ray's client adds the user's token wherever it finds no such header, also for a cluster that asks for none."""
_SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|ACCESS_KEY|API_?KEY|(?:^|_)KEY$", re.IGNORECASE)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_INTERRUPTED = 130
_RECONNECTS = 5
_POLL = 1.0
_SILENCE = 300.0
"""Seconds after which a connection that brings nothing is made anew: of one that died without a word nobody is told."""
_HELD = 20.0
"""Seconds after which a connection counts as one that was there: proxies end those on which nothing is said for a
minute, and a job that trains says nothing for longer."""


@dataclass(frozen=True)
class Submission:
    """What to submit: `run` or `sweep`, its configuration below `working_dir`, overrides, and NAME=VALUE variables.

    Raises ConfigError for another verb.
    """

    verb: str
    config: Path
    overrides: tuple[str, ...] = ()
    working_dir: Path = Path()
    env: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.verb not in VERBS:
            raise ConfigError(f"cannot submit {self.verb!r}; it is one of {', '.join(VERBS)}")


def submit_and_follow(
    wanted: Submission, address: str, console: Console, *, allow_unauthenticated: bool = False, client: Any = None
) -> int:
    """Submits a job, prints its log and returns its exit status; 130 if following was interrupted.

    `client` stands in for Ray's `JobSubmissionClient`. Raises ConfigError or ResourceError before anything is
    submitted; a job that fails is a status and not an error.
    """
    # What no cluster would take is said before one is asked.
    entry(wanted, here=True)
    runtime_env(wanted, os.environ, token=False, here=True)
    headers = authenticate(address, console, allow_unauthenticated=allow_unauthenticated)
    here = _is_here(address, headers)
    entrypoint = entry(wanted, here=here)
    environment = runtime_env(wanted, os.environ, token=bool(headers), here=here)
    try:
        client = client or _client(address, headers)
        job = client.submit_job(
            entrypoint=entrypoint,
            submission_id=f"kka-{wanted.verb}-{uuid.uuid4().hex[:12]}",
            runtime_env=environment,
            metadata={"kka": f"{wanted.verb} {wanted.config.name}"},
        )
    except (RuntimeError, ValueError, OSError) as error:  # refused, too large, or another version
        raise ResourceError(f"{address} did not take the job: {error}") from error
    console.print(f"submitted {job} to {address}", highlight=False, soft_wrap=True)
    ray = "RAY_AUTH_MODE=token ray" if headers else "ray"
    further = (
        f"the job goes on.\nfollow it: {ray} job logs {job} --follow --address {address}\n"
        f"stop it:   {ray} job stop {job} --address {address}"
    )
    try:
        return _ended(_follow(client, job, console), job, console)
    except KeyboardInterrupt:
        console.print(f"\nno longer following; {further}", highlight=False, soft_wrap=True)
        return _INTERRUPTED
    except ResourceError as error:
        raise ResourceError(f"{error}\n{further}") from error


def entry(wanted: Submission, *, here: bool) -> str:
    """The job's command line. Raises ConfigError for what would fail on the cluster only after it was uploaded.

    `here`: the cluster is this machine alone, and relative folders are made absolute. Elsewhere they must be so
    already.
    """
    folder = wanted.working_dir.resolve()
    if not (folder / "jobs" / "entry.py").is_file():
        raise ConfigError(f"{folder} has no jobs/entry.py; name the repository with --working-dir")
    file = wanted.config.resolve()
    if not file.is_relative_to(folder):
        raise ConfigError(f"{file} is not below {folder}, which is what the cluster gets; move it there")
    relative = file.relative_to(folder).as_posix()
    if _excluded(relative):
        raise ConfigError(f"{relative} lies in a folder that is not uploaded ({', '.join(EXCLUDES)}); move it")
    named: list[Path] = []
    if wanted.verb == "run":
        config, prefix = load(file, RunConfig, wanted.overrides), ""
    else:
        sweep = load_sweep(file, wanted.overrides)
        config, prefix = sweep.base, "run."
        for trial in sweep.trials:
            _check_paths(trial, folder)
        named = [] if sweep.extends is None else [*with_extended(sweep.extends, file.parent)]
    _check_uploaded([*extended(file), *named], file, folder, here=here)
    # Imported late: it brings Ray along.
    from kka_ray.experiment import absolute

    overrides = list(wanted.overrides)
    given = dict(tracking.flatten(config.model_dump(mode="json")))
    resolved = dict(tracking.flatten(absolute(config).model_dump(mode="json")))
    for name in sorted(resolved, key=lambda n: n != "output"):  # the others may follow from it
        value = resolved[name]
        if given[name] == value:
            continue
        if here:
            overrides.append(f"{prefix}{name}={_written(value)}")
        elif name in _WRITTEN:
            raise ConfigError(
                f"{name} is {given[name]!r}, which a job would write into its upload, a temporary folder of the "
                f"cluster. Name {_WRITTEN[name]}, as in -o {prefix}{name}={_SHARED.get(name, '/shared/kka')}"
            )
        elif not _uploaded(Path(value), folder):
            raise ConfigError(
                f"{name} is {given[name]!r}, which is not uploaded ({', '.join(EXCLUDES)}). Name a folder that the "
                f"cluster's nodes share, as in -o {prefix}{name}=/shared/{Path(value).name}"
            )
    options = [part for override in overrides for part in ("-o", override)]
    return shlex.join(["python", "-m", "jobs.entry", wanted.verb, relative, *options])


def _check_paths(trial: Trial, folder: Path) -> None:
    """Raises ConfigError if a parameter of a trial is a relative path that the job does not get."""
    from kka_ray.experiment import absolute

    given = dict(tracking.flatten(trial.config.model_dump(mode="json")))
    for name, value in tracking.flatten(absolute(trial.config).model_dump(mode="json")):
        if name not in trial.overrides or given[name] == value:
            continue
        if not _uploaded(Path(value), folder):
            raise ConfigError(
                f"{name} is {given[name]!r} in {trial.label}, which is not uploaded ({', '.join(EXCLUDES)}). Name an "
                "absolute path that the cluster's nodes share"
            )


def _written(path: str) -> str:
    """A path as an override gives it, whose value is read as YAML: quoted where that reads something else."""
    try:
        plain = yaml.safe_load(path) == path
    except yaml.YAMLError:
        plain = False
    return path if plain else json.dumps(path, ensure_ascii=False)


def _check_uploaded(named: Sequence[Path], file: Path, folder: Path, *, here: bool) -> None:
    """Raises ConfigError if a file that `file` names, relative to itself or absolute, is not there for the job."""
    for name in named:
        if not (here if name.is_absolute() else _uploaded((file.parent / name).resolve(), folder)):
            raise ConfigError(
                f"{file} names {name}, which the cluster does not get: uploaded is what lies below {folder} "
                f"without {', '.join(EXCLUDES)}. Put it there, and name it relative to the file that extends it"
            )


def runtime_env(wanted: Submission, environ: Mapping[str, str], *, token: bool, here: bool) -> dict[str, Any]:
    """The job's files and variables. Raises ConfigError for a variable that looks like a secret.

    `token` says that the cluster authenticates; the job's own processes then do as well, with the cluster's token.
    `here`: the cluster is this machine alone. Elsewhere the nodes have folders of their own.
    """
    variables = {name: environ[name] for name in _PASSED_ON_HERE if here and name in environ}
    variables["RAY_AUTH_MODE"] = "token" if token else "disabled"
    for pair in wanted.env:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--env {name!r} must look like NAME=VALUE")
        if _SECRET.search(name):
            raise ConfigError(
                f"--env {name} looks like a secret, and a job's environment can be read on the dashboard. Give it to "
                "the cluster's nodes instead, as a Kubernetes secret (jobs/README.md)"
            )
        variables[name] = value
    return {"working_dir": str(wanted.working_dir.resolve()), "excludes": list(EXCLUDES), "env_vars": variables}


def authenticate(address: str, console: Console, *, allow_unauthenticated: bool) -> dict[str, str]:
    """The headers to talk to the cluster with; none for a cluster without authentication, if that is allowed.

    The cluster is asked for its version without a token. Raises ResourceError if it answers and that is not allowed,
    if it cannot be reached, or if it wants a token that is not there or not the right one.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"the address {address!r} must look like http://HOST:8265")
    anonymous = _version_status(address, {})
    if anonymous == requests.codes.ok:
        if allow_unauthenticated:
            _warn(console, f"{address} asks for no token: whoever reaches it can run anything there")
            return {}
        raise ResourceError(
            f"{address} answers without a token, so whoever reaches it can run anything there. Start the cluster with "
            "RAY_AUTH_MODE=token (jobs/README.md), or submit with --allow-unauthenticated"
        )
    if anonymous not in (requests.codes.unauthorized, requests.codes.forbidden):
        raise ResourceError(f"{address} is no Ray dashboard: it answers /api/version with status {anonymous}")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        _warn(console, f"the token goes to {parts.hostname} unencrypted; use https or a tunnel")
    headers = {"Authorization": f"Bearer {read_token(os.environ)}"}
    if _version_status(address, headers) != requests.codes.ok:
        raise ResourceError(f"{address} does not accept the token that was found ({_token_source(os.environ)})")
    return headers


def read_token(environ: Mapping[str, str]) -> str:
    """The token from where Ray takes it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, then ~/.ray/auth_token.

    Raises ResourceError if there is none.
    """
    if environ.get("RAY_AUTH_TOKEN"):
        return environ["RAY_AUTH_TOKEN"].strip()
    path = _token_path(environ)
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise ResourceError(
            f"the cluster wants a token and {path} cannot be read ({error.strerror}). Put the cluster's token there, "
            "or set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None
    if not token:
        raise ResourceError(f"the cluster wants a token and {path} is empty; put the cluster's token there")
    return token


def _token_path(environ: Mapping[str, str]) -> Path:
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path.home() / ".ray" / "auth_token"


def _token_source(environ: Mapping[str, str]) -> str:
    return "in RAY_AUTH_TOKEN" if environ.get("RAY_AUTH_TOKEN") else f"in {_token_path(environ)}"


def _version_status(address: str, headers: Mapping[str, str]) -> int:
    try:
        # A redirect would carry the question, and with it the token, elsewhere.
        url = f"{address.rstrip('/')}/api/version"
        return requests.get(url, headers=dict(headers), timeout=20, allow_redirects=False).status_code
    except requests.RequestException as error:
        raise ResourceError(
            f"cannot reach a Ray dashboard at {address}: {type(error).__name__}. Is the cluster up "
            "(`RAY_AUTH_MODE=token ray start --head`), and its port "
            "forwarded (`kubectl port-forward svc/NAME-head-svc 8265`)?"
        ) from error


def _is_here(address: str, headers: Mapping[str, str]) -> bool:
    """Whether the cluster is this machine alone. A loopback address may lead elsewhere, as when a port is forwarded."""
    if urlsplit(address).hostname not in _LOOPBACK:
        return False
    try:
        url = f"{address.rstrip('/')}/nodes?view=hostNameList"
        answer = requests.get(url, headers=dict(headers), timeout=20, allow_redirects=False)
        hosts = answer.json()["data"]["hostNameList"] if answer.ok else []
    except (requests.RequestException, ValueError, KeyError):
        return False
    return list(hosts) == [socket.gethostname()]


def _client(address: str, headers: Mapping[str, str]) -> Any:
    # Imported late: it brings Ray along.
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address, headers=dict(headers or _NO_TOKEN))


def _follow(client: Any, job: str, console: Console) -> Any:
    """Prints the job's log until it ends, and returns what the cluster says of it then.

    A lost connection is taken up again where it broke off. Raises ResourceError if that fails several times in a row.
    """
    log, failures = _Log(console), 0
    while True:
        before, begun = log.printed, time.monotonic()
        try:
            asyncio.run(_tail(client, job, log))
            details = client.get_job_info(job)
        except (OSError, RuntimeError, ClientError) as error:  # OSError: of requests, too
            was_there = log.printed > before or time.monotonic() - begun > _HELD
            failures = 1 if was_there else failures + 1
            if failures > _RECONNECTS:
                raise ResourceError(
                    f"lost the connection to the job {job} {failures} times in a row: {error}"
                ) from error
            time.sleep(_POLL)
            continue
        if details.status.is_terminal():
            return details
        failures = 0
        time.sleep(_POLL)


@dataclass
class _Log:
    """What was printed of a log that every connection sends from its beginning."""

    console: Console
    printed: int = 0


async def _tail(client: Any, job: str, log: _Log) -> None:
    """Prints what is new of the job's log until the connection ends, or brings nothing for `_SILENCE`."""
    seen, parts = 0, aiter(client.tail_job_logs(job))
    while True:
        try:
            text = await asyncio.wait_for(anext(parts), _SILENCE)
        except (StopAsyncIteration, TimeoutError):
            return
        new = text[max(log.printed - seen, 0) :]
        seen += len(text)
        if new:
            log.console.print(new, end="", markup=False, highlight=False, soft_wrap=True)
            log.printed = seen


def _ended(details: Any, job: str, console: Console) -> int:
    status = str(details.status)
    if status == "SUCCEEDED":
        console.print(f"{job} succeeded", highlight=False)
        return 0
    # The message goes on to quote the end of the log, which was printed above.
    first = (details.message or "no reason was given").strip().splitlines()[0]
    reason = first.split(", last available logs")[0]
    console.print(f"[bold red]{job} {status.lower()}:[/] {escape(reason)}", highlight=False, soft_wrap=True)
    return int(getattr(details, "driver_exit_code", None) or 1)


def _warn(console: Console, text: str) -> None:
    console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _uploaded(path: Path, folder: Path) -> bool:
    """Whether an absolute path lies in what the cluster gets of `folder`."""
    return path.is_relative_to(folder) and not _excluded(path.relative_to(folder).as_posix())


def _excluded(relative: str) -> bool:
    folders = {name.strip("/") for name in EXCLUDES if name.startswith("/") and "*" not in name}
    return relative.split("/")[0] in folders
