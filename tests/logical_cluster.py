"""A cluster of several nodes on this machine, with logical GPUs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import kka_ray.cluster  # noqa: F401  sets what Ray reads from the environment

# isort: split
import ray
from ray.cluster_utils import Cluster


@contextmanager
def logical_cluster(nodes: Sequence[Mapping[str, int]]) -> Iterator[Cluster]:
    """Nodes with `num_cpus` and `num_gpus`; the first is the head. This process is not connected to them."""
    # The token of this user's local clusters, made if there is none; Ray reads it once a process.
    command = [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", "--generate"]
    subprocess.run(command, check=True, capture_output=True)
    cluster = Cluster(initialize_head=True, head_node_args={**nodes[0], "include_dashboard": False})
    try:
        for node in nodes[1:]:
            cluster.add_node(**node)
        yield cluster
    finally:
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
