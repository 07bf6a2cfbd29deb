"""Which clusters are joined: those that ask for a token, unless the user allows others."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import ray

from kka_ray.cluster.session import _answers_anybody, session
from kka_ray.config.models import ClusterConfig
from kka_ray.errors import ResourceError

ROOT = Path(__file__).parents[2]
HEAD = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
JOIN = """
import sys
from kka_ray.cluster.session import session
from kka_ray.config.models import ClusterConfig
from kka_ray.errors import ResourceError
try:
    with session(ClusterConfig(address=sys.argv[1], allow_unauthenticated=sys.argv[2] == "allow")):
        print("joined")
except ResourceError as error:
    print(error)
"""


def test_without_authentication_no_cluster_is_joined_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[Any] = []
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray, "init", lambda **options: joined.append(options["address"]))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    refusal = pytest.raises(ResourceError, match=r"RAY_AUTH_MODE=disabled .*10\.0\.0\.1:6379.*allow_unauthenticated")
    with refusal, session(ClusterConfig(address="10.0.0.1:6379")):
        pass
    assert joined == []
    with session(ClusterConfig(address="10.0.0.1:6379", allow_unauthenticated=True)):
        pass
    assert joined == ["10.0.0.1:6379"]


@pytest.mark.parametrize("code", [None, grpc.StatusCode.UNAUTHENTICATED])
def test_a_head_that_answers_without_a_token_is_found(code: grpc.StatusCode | None) -> None:
    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if code is not None:
            context.abort(code, "who are you")
        return b""

    server = grpc.server(futures.ThreadPoolExecutor(1))
    handlers = {"CheckAlive": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert _answers_anybody(f"127.0.0.1:{port}") == (code is None)
    finally:
        server.stop(None).wait()


def test_a_local_cluster_listens_at_the_loopback_alone() -> None:
    with session(ClusterConfig()):
        ray.get(ray.remote(num_cpus=0)(lambda: 0).remote())
        names = {process.pid: process.name() for process in psutil.Process().children(recursive=True)}
        listening = [
            (names[connection.pid], ipaddress.ip_address(connection.laddr.ip))
            for connection in psutil.net_connections(kind="inet")
            if connection.pid in names and connection.status == psutil.CONN_LISTEN
        ]
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    assert not [(name, ip) for name, ip in listening if not (getattr(ip, "ipv4_mapped", None) or ip).is_loopback]


@pytest.fixture
def open_to_all() -> Iterator[str]:
    """The address of a cluster without authentication."""
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert head.stdin
    assert head.stdout
    try:
        yield head.stdout.readline().strip()
    finally:
        head.stdin.close()
        head.wait(timeout=60)


@pytest.mark.slow
def test_a_cluster_that_asks_for_no_token_is_refused(open_to_all: str) -> None:
    def join(allow: str) -> str:
        environ = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
        return subprocess.run(
            [sys.executable, "-c", JOIN, open_to_all, allow],
            env={**environ, "RAY_AUTH_TOKEN": "some-token", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout

    refused = join("refuse")
    assert "joined" not in refused
    assert f"the cluster at {open_to_all} answers without a token" in refused
    assert "joined" in join("allow")
