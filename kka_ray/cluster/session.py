"""The connection to a Ray cluster: a local one of our own, or one that is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from kka_ray.config.models import ClusterConfig
from kka_ray.errors import ResourceError


@contextmanager
def session(config: ClusterConfig, *, verbose: bool = False) -> Iterator[None]:
    """Joins the cluster at `config.address`, or starts a local one that ends with the block.

    Where the process is connected already (inside a Tune trial or a Ray job's driver) that connection is used and left
    alone. A local cluster has no dashboard and asks for a token. Raises ResourceError if the cluster cannot be had.
    """
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    level = logging.INFO if verbose else logging.ERROR
    try:
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
            f"cannot start a local Ray cluster: {error}. On a machine with much else to do the same command may need "
            "another try"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> list[dict[str, float]]:
    """The resources of each living node of the cluster, by name (`CPU`, `GPU`, ...)."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
