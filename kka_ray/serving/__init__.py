"""The service: scores over HTTP, on Ray Serve."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kka_ray.cluster  # noqa: F401  sets what Ray reads from the environment, before anything here imports Ray
from kka_ray.config.models import ClusterConfig
from kka_ray.config.serve import ServeConfig
from kka_ray.errors import ResourceError
from kka_ray.serving.access import VARIABLE, Token, make_token, write_token
from kka_ray.serving.proxy import installed

APPLICATION = "kka"

_LOOPBACK, _ANY = ("127.0.0.1", "::1", "localhost"), ("0.0.0.0", "::")


@dataclass(frozen=True)
class Service:
    """A running service: its address, and the file with its token unless that came from the environment.

    An address at the loopback is that of the cluster's head, which is where Serve listens.
    """

    url: str
    token_file: Path | None


def start(run: str | Path, config: ServeConfig, blocking: bool, say: Callable[[str], None] = print) -> Service:
    """Serves the detector of a run's folder, or of a detector folder; either may be a URI.

    `blocking` starts a local Ray cluster (or joins the one of `RAY_ADDRESS`) and serves until interrupted; it must be
    called from the main thread. Otherwise this process must be connected to Ray, and the call returns as soon as the
    service answers; `ray.serve.shutdown()` ends it. `say` hears the address and where the token is, never the token.

    Raises AssetError if there is no detector, ConfigError if the packages of the engine are missing, ResourceError if
    the port or the cluster's CPUs or GPUs cannot be had, or if Serve runs on the cluster already: its address would not
    be the one asked for, and ending it would end others.
    """
    import ray

    from kka_ray.cluster.session import session
    from kka_ray.scoring import detector_folder

    with detector_folder(run):
        pass  # it is there; each replica loads it by itself
    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
        # Before a cluster is started, which takes a while.
        _check_port(config)
        if config.engine == "onnx":
            from kka_ray.features.onnx import packages

            packages()
    if not blocking:
        if not ray.is_initialized():
            raise ResourceError("a service that does not block needs a Ray cluster to live on: call ray.init() before")
        from ray import serve

        _check_cluster(config)
        try:
            return _deploy(run, config, make_token(), say)
        except BaseException:
            serve.shutdown()  # what was started would go on, and the next start be refused for it
            raise
    token = make_token()
    with installed(token.digest, config.max_total_bytes), session(ClusterConfig()):
        from ray import serve

        _check_cluster(config)
        try:
            service = _deploy(run, config, token, say)
            _wait_for_the_end()
            say("stopping")
        finally:
            serve.shutdown()
    return service


def _wait_for_the_end() -> None:
    """Returns at Ctrl-C, or at the SIGTERM of whatever supervises this process."""
    end = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: end.set()) for number in numbers]
    end.wait()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def _deploy(run: str | Path, config: ServeConfig, token: Token, say: Callable[[str], None]) -> Service:
    from ray import serve

    from kka_ray.serving.deployment import build_application

    _check_room(config)
    application = build_application(run, config, token.digest)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": config.port, "request_timeout_s": 2 * config.timeout},
        )
        serve.run(application, name=APPLICATION, route_prefix="/")
    except (RuntimeError, TimeoutError) as error:
        raise ResourceError(f"the service did not start: {_why() or error}") from error
    # Not before: the token of a service that runs already is not to go for one that does not start.
    token_file = write_token(token, run, config.port)
    head = _head_elsewhere()
    host = head if head and config.host in _ANY else config.host
    in_url = f"[{host}]" if ":" in host else host  # an IPv6 address
    service = Service(f"http://{in_url}:{config.port}", token_file)
    where = service.url
    if head and host in _LOOPBACK:
        where += (
            f" on the cluster's head, {head}, which no other machine reaches: --host 0.0.0.0 opens it to the network"
        )
    say(f"serving {run} at {where}; {f'token in {token_file}' if token_file else f'token from {VARIABLE}'}")
    return service


def _why() -> str:
    """What a replica that did not start raised at last; empty if Serve does not know. Of it Serve's own error names
    the deployment alone."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    said = [deployment.message for deployment in application.deployments.values()] if application else []
    # A traceback, whose last line is the error.
    return "; ".join(text.strip().splitlines()[-1] for text in said if "Traceback" in text)


def _head_elsewhere() -> str:
    """The address of the cluster's head, on which alone Serve's proxy is started; empty if this process is on it."""
    import ray

    head = next(node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"])
    return "" if head["NodeID"] == ray.get_runtime_context().get_node_id() else str(head["NodeManagerAddress"])


def _check_cluster(config: ServeConfig) -> None:
    """Whether Serve and the port are free on the cluster that this process is connected to."""
    _check_serve_is_ours()
    if not _head_elsewhere():
        _check_port(config)


def _check_port(config: ServeConfig) -> None:
    """Serve would retry for minutes where the port is taken."""
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # the latter for a name that is none, such as one of 64 letters
        raise ResourceError(
            f"cannot listen on {config.host} port {config.port}: {error}; choose another --port or --host"
        ) from error


def _check_serve_is_ours() -> None:
    from ray import serve

    if serve.status().proxies:
        raise ResourceError("Ray Serve runs on this cluster already; use `serve deploy serve/config.yaml` there")


def _check_room(config: ServeConfig) -> None:
    """Serve would wait for ever where the cluster is too small."""
    from kka_ray.cluster.plan import Phase, Plan, Share
    from kka_ray.cluster.session import nodes

    replicas = Share("replicas", config.replicas, config.cpus, config.gpus, config.threads)
    remedy = (
        "Lower the replicas (--replicas), or the cpus or gpus of each (ServeConfig); or join a larger cluster "
        "(RAY_ADDRESS)"
    )
    Plan((Phase("serve", (replicas,)),), "the service", remedy).check(nodes())
