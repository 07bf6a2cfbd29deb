"""A cluster of several nodes on this machine, with logical GPUs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import kka_ray.cluster  # noqa: F401  sets what Ray reads from the environment

# isort: split
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

_COUNTED = ("CPU", "GPU")
_OF_RAY = ("_AutoscalingCoordinatorActor", "DatasetManager", "TrainStateActor")
"""Ray Train keeps these for its next job; they take no resources."""


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


def assert_nothing_is_left() -> None:
    """No actor, placement group or share of the resources may be left on the cluster that this process is connected to.

    Gives Ray a minute to clear up.
    """
    wait_for(lambda: not _living_actors(), lambda: f"actors are left: {_living_actors()}")
    wait_for(
        lambda: all(g["state"] == "REMOVED" for g in placement_group_table().values()),
        lambda: f"placement groups are left: {placement_group_table()}",
    )
    wait_for(
        lambda: all(ray.available_resources().get(k) == v for k, v in ray.cluster_resources().items() if k in _COUNTED),
        lambda: f"free: {ray.available_resources()} of {ray.cluster_resources()}",
    )


def _living_actors() -> list[str]:
    living = [a["ActorClassName"] for a in actors().values() if a["State"] != "DEAD"]
    return [name for name in living if name not in _OF_RAY]


def wait_for(condition: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    """Waits a minute for a condition; then fails with what `otherwise` says."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.2)
