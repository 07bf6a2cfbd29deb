"""The connection to a Ray cluster: a local one of our own, or one that is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import grpc
import ray
from ray._private import ray_constants
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from kka_ray.config.models import ClusterConfig
from kka_ray.errors import ResourceError


@contextmanager
def session(config: ClusterConfig, *, verbose: bool = False) -> Iterator[None]:
    """Joins the cluster at `config.address`, or starts a local one that ends with the block.

    Where the process is connected already (inside a Tune trial or a Ray job's driver) that connection is used and left
    alone. A local cluster has no dashboard, listens at the loopback and asks for a token. Raises ResourceError if the
    cluster cannot be had, or if the one at `config.address` asks for no token and `config.allow_unauthenticated` is not
    set.
    """
    if ray.is_initialized():
        yield
        return
    guarded = config.address is not None and not config.allow_unauthenticated
    if guarded and os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        raise _unauthenticated(f"RAY_AUTH_MODE=disabled is set, so the cluster at {config.address} is joined")
    address = config.address or os.environ.get("RAY_ADDRESS")
    level = logging.INFO if verbose else logging.ERROR
    try:
        with nullcontext() if address else _loopback():
            ray.init(
                address=address or "local",
                log_to_driver=verbose,
                logging_level=level,
                include_dashboard=None if address else False,
            )
    except Exception as error:  # Ray raises a bare one where a node is not up within its 30 s
        if address:
            raise ResourceError(f"cannot reach the Ray cluster at {address!r}: {error}") from error
        raise ResourceError(
            f"cannot start a local Ray cluster: {str(error).rstrip('.')}. On a machine with much else to do the same "
            "command may need another try"
        ) from error
    try:
        if guarded and _answers_anybody(ray.get_runtime_context().gcs_address):
            raise _unauthenticated(f"the cluster at {config.address} answers")
        yield
    finally:
        ray.shutdown()


@contextmanager
def _loopback() -> Iterator[None]:
    """Within the block Ray starts clusters that listen at the loopback alone, as it does where it knows single machines
    only; there is no option for it."""
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _answers_anybody(address: str) -> bool:
    """Whether a cluster's head answers without a token. One that wants certificates does not answer either."""
    with grpc.insecure_channel(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=20)
        except grpc.RpcError:
            return False
    return True


def _unauthenticated(what: str) -> ResourceError:
    return ResourceError(
        f"{what} without a token, and whoever reaches it can run anything there. Start the cluster with "
        "RAY_AUTH_MODE=token (jobs/README.md), or set cluster.allow_unauthenticated=true"
    )


def nodes() -> list[dict[str, float]]:
    """The resources of each living node of the cluster, by name (`CPU`, `GPU`, ...)."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
