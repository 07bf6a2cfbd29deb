"""Submitting jobs: what is refused before it is sent, what is sent, how it is followed, and a real cluster once."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import yaml
from rich.console import Console

from jobs import entry as job_entry
from kka_ray import submission
from kka_ray.config import RunConfig, load
from kka_ray.config.sweep import load_sweep
from kka_ray.errors import ConfigError, ResourceError
from kka_ray.submission import Submission, authenticate, entry, read_token, runtime_env, submit_and_follow

ROOT = Path(__file__).parents[1]
TOKEN = "a-token-for-tests-0123456789"
SHARED = ("output=/shared/kka", "store.uri=/shared/kka/store")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder that looks like the repository, with a run and a sweep."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "entry.py").write_text("")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "base", "data": {"kind": "flowers"}}))
    sweep = {"name": "s", "run": {"extends": "run.yaml"}, "parameters": {"loop.rounds": {"grid": [0, 1]}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return tmp_path


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def dashboard() -> Iterator[Callable[[str | None], str]]:
    """`dashboard(token)` is the address of a server that answers /api/version as Ray's does."""
    servers: list[HTTPServer] = []
    hosts = [socket.gethostname()]

    def start(token: str | None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                given = self.headers.get("Authorization")
                status = 200 if token is None or given == f"Bearer {token}" else 403 if given else 401
                known = {"/api/version": {}, "/nodes?view=hostNameList": {"data": {"hostNameList": hosts}}}
                self.send_response(status if self.path in known else 404)
                self.end_headers()
                self.wfile.write(json.dumps(known.get(self.path, {})).encode())

            def log_message(self, format: str, *values: Any) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()


class FakeClient:
    """Stands in for Ray's JobSubmissionClient: replays a log, breaking off as told, then ends with a status."""

    def __init__(self, log: str, breaks: tuple[int, ...] = (), status: str = "SUCCEEDED", **details: Any) -> None:
        self.log, self.breaks, self.status, self.details = log, list(breaks), status, details
        self.submitted: dict[str, Any] = {}
        self.interrupt = False

    def submit_job(self, **arguments: Any) -> str:
        self.submitted = arguments
        return str(arguments["submission_id"])

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        if self.interrupt:
            raise KeyboardInterrupt
        end = self.breaks.pop(0) if self.breaks else None
        for start in range(0, len(self.log[:end]), 4):
            yield self.log[:end][start : start + 4]
        if end is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, job: str) -> Any:
        from ray.job_submission import JobStatus

        details = {"message": "", "driver_exit_code": None, **self.details}
        return SimpleNamespace(status=JobStatus(self.status), **details)


@pytest.fixture
def send(
    repository: Path, console: Console, dashboard: Callable[[str | None], str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[FakeClient], int]:
    """Submits the run to a cluster with a token, through a fake client."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(submission, "_POLL", 0.0)
    wanted = Submission("run", repository / "run.yaml", SHARED, repository)
    return lambda client: submit_and_follow(wanted, dashboard(TOKEN), console, client=client)


def test_the_entry_point_names_the_file_from_the_repository_and_quotes_overrides(repository: Path) -> None:
    overrides = (*SHARED, "describe.instruction=two words")
    command = entry(Submission("run", repository / "run.yaml", overrides, repository), here=False)
    assert command == (
        "python -m jobs.entry run run.yaml -o output=/shared/kka -o store.uri=/shared/kka/store "
        "-o 'describe.instruction=two words'"
    )
    assert "s3://b/kka" in entry(
        Submission("run", repository / "run.yaml", (SHARED[0], "store.uri=s3://b/kka"), repository), here=False
    )
    shared = tuple(f"run.{o}" for o in SHARED)
    assert entry(Submission("sweep", repository / "sweep.yaml", shared, repository), here=False).startswith(
        "python -m jobs.entry sweep sweep.yaml -o run.output="
    )


def test_on_this_machine_relative_folders_are_made_absolute(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = entry(Submission("run", repository / "run.yaml", (), repository), here=True)
    assert command.endswith(f"-o output={tmp_path / 'runs'} -o store.uri={tmp_path / 'runs' / 'store'}")
    command = entry(Submission("sweep", repository / "sweep.yaml", ("run.store.uri=s3://b",), repository), here=True)
    assert command.endswith(f"-o run.store.uri=s3://b -o run.output={tmp_path / 'runs'}")
    commented = tmp_path / "exp #3"
    commented.mkdir()
    monkeypatch.chdir(commented)
    command = entry(Submission("run", repository / "run.yaml", (), repository), here=True)
    given = [part for before, part in itertools.pairwise(shlex.split(command)) if before == "-o"]
    assert load(repository / "run.yaml", RunConfig, given).output == str(commented / "runs")
    monkeypatch.chdir(tmp_path)
    photographs = ("data={kind: cifar100, path: furniture}", *SHARED)
    command = entry(Submission("run", repository / "run.yaml", photographs, repository), here=True)
    assert command.endswith(f"-o data.path={tmp_path / 'furniture'}")
    tracked = ("output=s3://b/kka", "tracking.uri=http://tracking:5000")
    command = entry(Submission("run", repository / "run.yaml", tracked, repository), here=True)
    assert "output=s3://b/kka" in command
    assert command.endswith(f"-o store.uri={tmp_path / 'runs' / 'store'}")
    command = entry(
        Submission("sweep", repository / "sweep.yaml", ("run.tracking.uri=sqlite:///db/m.db",), repository), here=True
    )
    assert f"-o run.tracking.uri=sqlite:///{tmp_path / 'db' / 'm.db'}" in command


def test_a_sweep_whose_run_is_a_file_can_be_submitted(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = {"name": "s", "run": "run.yaml", "parameters": {"loop.rounds": {"grid": [0, 1]}}}
    file = repository / "named.yaml"
    file.write_text(yaml.safe_dump(sweep))
    given = shlex.split(entry(Submission("sweep", file, (), repository), here=True))
    overrides = [o for flag, o in pairwise(given) if flag == "-o"]
    assert load_sweep(file, overrides).base.output == str(tmp_path / "runs")
    shared = tuple(f"run.{o}" for o in SHARED)
    assert "run.output=/shared/kka" in entry(Submission("sweep", file, shared, repository), here=False)


def test_a_swept_path_that_the_job_does_not_get_is_refused(repository: Path) -> None:
    file = repository / "swept.yaml"

    def given(*pipelines: str) -> str:
        parameters = {"render.pipeline": {"grid": ["builtin:flowers", *pipelines]}}
        file.write_text(yaml.safe_dump({"name": "s", "run": "run.yaml", "parameters": parameters}))
        return entry(Submission("sweep", file, tuple(f"run.{o}" for o in SHARED), repository), here=False)

    for pipeline in ("hub:org/name", "/shared/pipeline"):
        assert "swept.yaml" in given(pipeline)
    for here in (repository / "renderers" / "mine", repository / "runs" / "mine"):
        here.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"'renderers/mine' in trial 1 .*not uploaded.*absolute path"):
        given("renderers/mine")


def test_local_models_and_images_are_made_absolute_or_refused_where_they_are_not_uploaded(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for override in (
        "render.pipeline=./renderers/mine/pipeline",
        "detect.outside=data/cifar10",
        "backbone.model=./renderers/backbone",
        "describe.sampler.model=./data/model",
    ):
        kind = "describe.sampler.kind=transformers"
        wanted = Submission("run", repository / "run.yaml", (*SHARED, kind, override), repository)
        name, _, path = override.partition("=")
        assert entry(wanted, here=True).endswith(f"-o {name}={(tmp_path / path).resolve()}")
        with pytest.raises(ConfigError, match=f"{name} is .*which is not uploaded.*-o {name}=/shared/"):
            entry(wanted, here=False)
    uploaded = Submission("run", repository / "run.yaml", (*SHARED, "render.pipeline=./models/mine"), repository)
    assert entry(uploaded, here=False).endswith("-o render.pipeline=./models/mine")


@pytest.mark.parametrize(
    ("verb", "file", "overrides", "message"),
    [
        ("train", "run.yaml", SHARED, "one of run, sweep"),
        ("run", "run.yaml", (), "temporary folder of the cluster.*-o output="),
        ("run", "run.yaml", SHARED[:1], "-o store.uri="),
        ("run", "run.yaml", ("output=s3://bucket/kka", SHARED[1]), "tracking.uri="),
        ("run", "run.yaml", (*SHARED, "tracking.uri=sqlite:///mlflow.db"), "tracking.uri is .*-o tracking.uri=sqlite"),
        ("sweep", "sweep.yaml", (), "-o run.output="),
        ("run", "run.yaml", (*SHARED, "loop.ronds=1"), "did you mean 'rounds'"),
        ("run", "../outside.yaml", SHARED, "is not below"),
        ("run", "data/run.yaml", SHARED, "is not uploaded"),
    ],
)
def test_what_would_fail_on_the_cluster_is_refused_here(
    repository: Path, verb: str, file: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        entry(Submission(verb, repository / file, overrides, repository), here=False)


def test_a_configuration_that_no_cluster_would_take_is_refused_before_one_is_asked(
    repository: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "authenticate", lambda *_, **__: pytest.fail("the cluster was asked"))
    wanted = Submission("run", repository / "run.yaml", (*SHARED, "loop.ronds=1"), repository)
    with pytest.raises(ConfigError, match="did you mean 'rounds'"):
        submission.submit_and_follow(wanted, "http://nowhere:8265", console)


@pytest.fixture
def extending(repository: Path) -> Callable[[str], list[Submission]]:
    """`extending(NAME)` are runs and sweeps of the repository that extend what `configs/NAME` is, in every way."""
    configs = repository / "configs"
    configs.mkdir()
    sweep = {"name": "s", "parameters": {"loop.rounds": {"grid": [0, 1]}}}

    def write(name: str) -> list[Submission]:
        (configs / "direct.yaml").write_text(yaml.safe_dump({"extends": name}))
        (configs / "indirect.yaml").write_text(yaml.safe_dump({"extends": "../configs/direct.yaml"}))
        (configs / "named.yaml").write_text(yaml.safe_dump({**sweep, "run": name}))
        (configs / "within.yaml").write_text(yaml.safe_dump({**sweep, "run": {"extends": "indirect.yaml"}}))
        (configs / "further.yaml").write_text(yaml.safe_dump({"extends": "named.yaml"}))
        shared = tuple(f"run.{o}" for o in SHARED)
        return [
            *(Submission("run", configs / f"{n}.yaml", SHARED, repository) for n in ("direct", "indirect")),
            *(Submission("sweep", configs / f"{n}.yaml", shared, repository) for n in ("named", "within", "further")),
        ]

    return write


def test_what_a_configuration_extends_must_be_uploaded(
    repository: Path, extending: Callable[[str], list[Submission]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "base.yaml"
    for file in (outside, repository / "runs" / "old" / "base.yaml"):
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / "run.yaml", file)
    for wanted in extending("../run.yaml"):
        assert entry(wanted, here=False)
    for name in (os.path.relpath(outside, repository / "configs"), "../runs/old/base.yaml"):
        for wanted in extending(name):
            for here in (False, True):
                with pytest.raises(ConfigError, match=f"{re.escape(name)}, which the cluster does not get"):
                    entry(wanted, here=here)


def test_what_is_extended_by_an_absolute_name_is_there_on_this_machine_alone(
    repository: Path, extending: Callable[[str], list[Submission]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    shutil.copy(repository / "run.yaml", outside / "base.yaml")
    (outside / "over.yaml").write_text(yaml.safe_dump({"extends": "base.yaml"}))
    for name in (str(outside / "over.yaml"), str(repository / "run.yaml")):
        for wanted in extending(name):
            assert entry(wanted, here=True)
            with pytest.raises(ConfigError, match=f"names {re.escape(name)}, which the cluster does not get"):
                entry(wanted, here=False)


def test_a_loopback_address_may_lead_elsewhere(
    dashboard: Callable[[str | None], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, headers = dashboard(TOKEN), {"Authorization": f"Bearer {TOKEN}"}
    assert submission._is_here(address, headers)
    assert not submission._is_here(address, {}), "what cannot be asked is not here"
    monkeypatch.setattr(submission.socket, "gethostname", lambda: "laptop")
    assert not submission._is_here(address, headers)
    assert not submission._is_here("http://cluster:8265", headers)


def test_another_folder_than_the_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--working-dir"):
        entry(Submission("run", tmp_path / "run.yaml", SHARED, tmp_path), here=False)


def test_the_environment_has_what_was_named_and_never_a_token(repository: Path) -> None:
    environ = {"KKA_CACHE": "/models", "RAY_AUTH_TOKEN": TOKEN, "HOME": "/root"}
    own = {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    pairs = tuple(f"{name}={value}" for name, value in own.items())
    made = runtime_env(Submission("run", Path("x"), (), repository, pairs), environ, token=True, here=True)
    assert made["env_vars"] == {"KKA_CACHE": "/models", "RAY_AUTH_MODE": "token"} | own
    assert made["working_dir"] == str(repository)
    assert TOKEN not in json.dumps(made)
    elsewhere = runtime_env(Submission("run", Path("x"), (), repository), environ, token=True, here=False)
    assert elsewhere["env_vars"] == {"RAY_AUTH_MODE": "token"}, "the nodes' own folder of models holds"


@pytest.mark.parametrize(
    "pair",
    [
        "RAY_AUTH_TOKEN=x",
        "AWS_SECRET_ACCESS_KEY=x",
        "MLFLOW_TRACKING_PASSWORD=x",
        "SAMPLER_KEY=x",  # as docs/howto.md calls it
        "OPENAI_APIKEY=x",
        "PGPASSWD=x",
        "NAME",
    ],
)
def test_secrets_and_half_variables_are_refused(repository: Path, pair: str) -> None:
    with pytest.raises(ConfigError, match=r"looks like a secret|NAME=VALUE"):
        runtime_env(Submission("run", Path("x"), (), repository, (pair,)), {}, token=True, here=True)


def test_data_and_runs_are_left_out_of_the_upload_and_the_package_of_that_name_is_not() -> None:
    from ray._private.runtime_env.packaging import _get_excludes

    excluded = _get_excludes(ROOT, list(submission.EXCLUDES))
    for name in ("data/x.parquet", "runs/demo/summary.json", ".git/HEAD", ".venv/bin/ray", "kka_ray/__pycache__/a.pyc"):
        assert excluded(ROOT / name), name
    for name in ("scores/a.csv", ".env", "serve/.env", "demo.token", "serve/demo.token"):
        assert excluded(ROOT / name), name
    for name in ("kka_ray/data/base.py", "kka_ray/cli.py", "jobs/entry.py", "configs/demo.yaml", "tests/data/x.py"):
        assert not excluded(ROOT / name), name


def test_a_cluster_that_asks_for_no_token_is_refused_unless_allowed(
    dashboard: Callable[[str | None], str], console: Console
) -> None:
    open_to_all = dashboard(None)
    with pytest.raises(ResourceError, match="answers without a token"):
        authenticate(open_to_all, console, allow_unauthenticated=False)
    assert authenticate(open_to_all, console, allow_unauthenticated=True) == {}
    assert "whoever reaches it" in said(console)


def test_the_token_is_sent_where_it_is_asked_for(
    dashboard: Callable[[str | None], str], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = dashboard(TOKEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert authenticate(guarded, console, allow_unauthenticated=False) == {"Authorization": f"Bearer {TOKEN}"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    with pytest.raises(ResourceError, match="does not accept the token") as refused:
        authenticate(guarded, console, allow_unauthenticated=False)
    assert "another" not in str(refused.value)


def test_who_sends_us_elsewhere_gets_no_token(
    dashboard: Callable[[str | None], str], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, given = dashboard(TOKEN), []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given.append(self.headers.get("Authorization"))
            self.send_response(302)
            self.send_header("Location", f"{elsewhere}{self.path}")
            self.end_headers()

        def log_message(self, format: str, *values: Any) -> None:
            pass

    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    server = HTTPServer(("127.0.0.1", 0), Redirecting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ResourceError, match="no Ray dashboard: it answers /api/version with status 302"):
            authenticate(f"http://127.0.0.1:{server.server_port}", console, allow_unauthenticated=False)
    finally:
        server.shutdown()
    assert given == [None]


def test_a_cluster_that_asks_for_no_token_is_sent_none(
    repository: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str | None] = []

    class Open(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given.append(self.headers.get("Authorization"))
            known = self.path == "/api/version"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"ray_version": "2.50.0"} if known else {}).encode())

        do_POST = do_PUT = do_GET

        def log_message(self, format: str, *values: Any) -> None:
            pass

    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as the import of kka_ray.cluster sets it
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    server = HTTPServer(("127.0.0.1", 0), Open)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    wanted = Submission("run", repository / "run.yaml", SHARED, repository)
    try:
        with pytest.raises(ResourceError, match="did not take the job"):
            submit_and_follow(wanted, address, console, allow_unauthenticated=True)
    finally:
        server.shutdown()
    assert len(given) > 3, "Ray's own client asked"
    assert set(given) == {None, "none"}


def test_what_is_no_dashboard_is_said_so(console: Console) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ResourceError, match=r"cannot reach.*`RAY_AUTH_MODE=token ray start --head`"):
            authenticate(f"http://127.0.0.1:{unused.getsockname()[1]}", console, allow_unauthenticated=True)
    with pytest.raises(ConfigError, match="must look like"):
        authenticate("127.0.0.1:8265", console, allow_unauthenticated=True)


def test_the_token_is_looked_for_where_ray_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("default\n")
    (tmp_path / "named").write_text("named\n")
    assert read_token({}) == "default"
    assert read_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}) == "named"
    assert read_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named"), "RAY_AUTH_TOKEN": "direct"}) == "direct"
    with pytest.raises(ResourceError, match="cannot be read"):
        read_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "missing")})


def test_the_log_is_printed_and_success_is_status_0(send: Callable[[FakeClient], int], console: Console) -> None:
    client = FakeClient("one\n[two]\nthree\n")
    assert send(client) == 0
    assert "one\n[two]\nthree\n" in said(console)
    assert TOKEN not in said(console) + json.dumps(client.submitted)
    assert client.submitted["runtime_env"]["env_vars"]["RAY_AUTH_MODE"] == "token"


def test_a_job_that_is_not_taken_is_an_error(
    send: Callable[[FakeClient], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient("")

    def refuse(**_: Any) -> str:
        raise ValueError("the package is larger than 500 MiB")

    monkeypatch.setattr(client, "submit_job", refuse)
    with pytest.raises(ResourceError, match="did not take the job: the package is larger"):
        send(client)


def test_a_lost_connection_goes_on_where_it_broke_off(send: Callable[[FakeClient], int], console: Console) -> None:
    log = "".join(f"line {i}\n" for i in range(30))
    assert send(FakeClient(log, breaks=(10, 101))) == 0
    assert said(console).count("line 1\n") == 1
    assert log in said(console)


def test_a_connection_that_is_lost_for_good_is_an_error(send: Callable[[FakeClient], int]) -> None:
    with pytest.raises(ResourceError, match="lost the connection"):
        send(FakeClient("log\n", breaks=(1,) * 20))


@pytest.mark.parametrize(("status", "code", "expected"), [("FAILED", 7, 7), ("FAILED", None, 1), ("STOPPED", None, 1)])
def test_a_job_that_fails_has_its_own_status_and_reason(
    send: Callable[[FakeClient], int], console: Console, status: str, code: int | None, expected: int
) -> None:
    message = "Job entrypoint command failed with exit code 7, last available logs (truncated):\nlong tail"
    assert send(FakeClient("log\n", status=status, message=message, driver_exit_code=code)) == expected
    assert f"{status.lower()}: Job entrypoint command failed with exit code 7\n" in said(console)
    assert "long tail" not in said(console)


def test_an_interruption_leaves_the_job_and_says_how_to_go_on(
    send: Callable[[FakeClient], int], console: Console
) -> None:
    client = FakeClient("log\n")
    client.interrupt = True
    assert send(client) == 130
    assert re.search(r"ray job logs kka-run-\w+ --follow --address http://127", said(console))
    assert re.search(r"ray job stop kka-run-\w+ --address", said(console))


def test_the_entry_point_takes_two_verbs_only(capsys: pytest.CaptureFixture[str]) -> None:
    job_entry.check(["run", "x.yaml"])
    job_entry.check(["sweep", "x.yaml"])
    for arguments in ([], ["gc", "--delete"]):
        with pytest.raises(SystemExit) as ended:
            job_entry.check(arguments)
        assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_the_manifests_ask_for_a_token_and_hold_none(name: str) -> None:
    text = (ROOT / "jobs" / "kuberay" / f"{name}.yaml").read_text()
    manifest = yaml.safe_load(text)
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "kka-ray-token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for container in [g["template"]["spec"]["containers"][0] for g in groups]:
        assert container["resources"]["limits"]["memory"]
        # A pod that asks for a GPU waits for ever where there is none, and neither the demo nor the service takes one.
        assert set(container["resources"]["limits"]) == {"cpu", "memory"} == set(container["resources"]["requests"])
        assert [m["name"] for m in container["volumeMounts"]] == ["runs"]
        assert not any("TOKEN" in e["name"] and "value" in e for e in container.get("env", []))
    claim = yaml.safe_load((ROOT / "jobs" / "kuberay" / "claim.yaml").read_text())
    volumes = [v["persistentVolumeClaim"] for g in groups for v in g["template"]["spec"]["volumes"]]
    assert {v["claimName"] for v in volumes} == {claim["metadata"]["name"]}
    if name == "rayjob":
        words = spec["entrypoint"].split()
        assert words[:4] == ["python", "-m", "jobs.entry", "run"]
        assert (ROOT / words[4].removeprefix("/app/")).is_file()
    else:
        assert yaml.safe_load(spec["serveConfigV2"])["applications"][0]["import_path"] == "serve.app:build"


DUMMY = """
import os, sys
print("mode", os.environ["RAY_AUTH_MODE"], "joins", bool(os.environ["RAY_ADDRESS"]), flush=True)
if "seed=1" in sys.argv:
    raise ValueError("the dummy fails")
if "seed=7" in sys.argv:
    sys.exit(7)
print("the dummy is done", flush=True)
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A Ray cluster of this test's own, with a token: its address and the token's file."""
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    environ = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environ = {k: v for k, v in environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    folder = Path("/tmp") / f"kka-ray-{secrets.token_hex(4)}"  # sockets want a short path
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    options = [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}"]
    options += ["--num-cpus=1", "--object-store-memory=100000000", f"--temp-dir={folder}"]
    head = subprocess.Popen([*command, *options], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{ports[1]}"
        deadline = time.monotonic() + 120
        while True:
            try:
                if submission._version_status(address, {}) == 401:
                    break
            except ResourceError:
                pass
            assert head.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "the dashboard did not come up"
            time.sleep(1)
        yield address, token
    finally:
        head.terminate()  # with --block it ends what it started, and nobody else's
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_jobs_on_a_real_cluster_with_a_token(cluster: tuple[str, Path], repository: Path) -> None:
    address, token = cluster
    (repository / "jobs" / "entry.py").write_text(DUMMY)
    (repository / "jobs" / "__init__.py").write_text("")

    def submit(*overrides: str, token_file: Path = token) -> subprocess.CompletedProcess[str]:
        options = [part for o in (*SHARED, *overrides) for part in ("-o", o)]
        command = [sys.executable, "-m", "kka_ray.cli", "submit", "run", str(repository / "run.yaml"), *options]
        environ = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS")}
        return subprocess.run(
            [*command, "--address", address, "--working-dir", str(repository)],
            env={**environ, "RAY_AUTH_TOKEN_PATH": str(token_file), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=180,
        )

    done = submit()
    assert done.returncode == 0, done.stderr
    assert "mode token joins True" in done.stdout
    assert "the dummy is done" in done.stdout
    assert token.read_text() not in done.stdout + done.stderr
    failed = submit("seed=1")
    assert failed.returncode == 1
    assert "ValueError: the dummy fails" in failed.stdout
    assert submit("seed=7").returncode == 7
    other = repository / "other"
    other.write_text("not the token")
    refused = submit(token_file=other)
    assert refused.returncode == 2
    assert "does not accept the token" in refused.stderr


def test_lost_connections_count_only_in_a_row(send: Callable[[FakeClient], int], console: Console) -> None:
    log = "".join(f"line {i}\n" for i in range(30))
    assert send(FakeClient(log, breaks=tuple(range(8, 200, 8)))) == 0
    assert log in said(console)


def test_connections_that_a_proxy_ends_for_their_silence_are_not_lost(
    send: Callable[[FakeClient], int], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    class Quiet(FakeClient):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            nonlocal now
            now += 60
            async for text in super().tail_job_logs(job):
                yield text

    monkeypatch.setattr(submission, "time", SimpleNamespace(monotonic=lambda: now, sleep=lambda seconds: None))
    assert send(Quiet("log\n", breaks=(0,) * 20)) == 0
    assert "log\n" in said(console)


def test_a_connection_that_died_without_a_word_is_made_anew(
    send: Callable[[FakeClient], int], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "_SILENCE", 0.05)

    class Dead(FakeClient):
        connections = 0

        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            self.connections += 1
            self.status = "SUCCEEDED" if self.connections > 2 else "RUNNING"
            yield self.log[: 4 * self.connections]
            await asyncio.sleep(3600)

    client = Dead("a log of some length\n")
    assert send(client) == 0
    assert client.connections == 3
    assert "a log of som" in said(console)


def test_a_cluster_that_does_not_say_how_the_job_is_is_asked_again(
    send: Callable[[FakeClient], int], console: Console
) -> None:
    class Silent(FakeClient):
        asked = 0

        def get_job_info(self, job: str) -> Any:
            self.asked += 1
            if self.asked < 4 or self.log == "for good":
                raise requests.ConnectionError("connection reset")
            return super().get_job_info(job)

    assert send(Silent("log\n")) == 0
    assert said(console).count("log\n") == 1
    with pytest.raises(ResourceError, match=r"(?s)connection reset.*the job goes on.*ray job logs kka-run-"):
        send(Silent("for good"))
