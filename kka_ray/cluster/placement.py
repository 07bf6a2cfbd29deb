"""Places on the cluster that are had as a whole or not at all, and given back."""

from __future__ import annotations

import uuid
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.util import get_current_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kka_ray.cluster.session import nodes
from kka_ray.config.models import ClusterConfig, PoolConfig
from kka_ray.errors import NotFreeError

DIED = (RayActorError, OutOfMemoryError)
"""What is raised by calls of an actor whose process is gone; the second where Ray ended it for lack of memory."""


def reserve(name: str, pool: PoolConfig, cluster: ClusterConfig) -> Any:
    """A placement group for the workers of a GPU pool; None for a pool without GPUs and inside a trial, which has one.

    Raises NotFreeError if the places are not free within `cluster.start_timeout`.
    """
    return _had(ask(name, pool, pool.workers), name, pool, cluster)


def ask(name: str, pool: PoolConfig, workers: int) -> Any:
    """As `reserve`, for so many workers and without waiting: who starts in the group waits until it has its places."""
    if not pool.gpus or get_current_placement_group() is not None:
        return None
    return _group(name, pool, workers)


class Kept:
    """Places for the workers of a Train job, kept free from before the pools take theirs until the job starts.

    Ray puts small workers where most is left: a sampler on one node and a renderer on another, so that neither node has
    room for a large worker, although the plan found some.
    """

    def __init__(self, name: str, size: PoolConfig, cluster: ClusterConfig) -> None:
        self.name, self.size, self._cluster = name, size, cluster
        self._group: Any = None
        self._over = False

    def open(self) -> None:
        """Takes the places, unless they were given up before. Raises NotFreeError as `reserve` does.

        None are taken on a single node, where it is no matter who lies where, and within a trial, whose own places Ray
        Tune has taken already.
        """
        alone = len(nodes()) == 1 or get_current_placement_group() is not None
        if self._group is None and not self._over and not alone and _bundle(self.size):
            group = _group(self.name.replace(" ", "-"), self.size, self.size.workers)
            self._group = _had(group, self.name, self.size, self._cluster)

    def free(self) -> None:
        """Gives the places up for good."""
        release(self._group)
        self._group, self._over = None, True


def _bundle(size: PoolConfig) -> dict[str, float]:
    """What a worker takes, as Ray wants it: without what it takes nothing of."""
    return {kind: amount for kind, amount in (("CPU", size.cpus), ("GPU", size.gpus)) if amount}


def _group(name: str, size: PoolConfig, workers: int) -> Any:
    return placement_group([_bundle(size)] * workers, strategy="PACK", name=f"kka-{name}-{uuid.uuid4().hex[:8]}")


def _had(group: Any, name: str, size: PoolConfig, cluster: ClusterConfig) -> Any:
    """The group once it has its places."""
    try:
        # Not `group.wait`: where the cluster's head is slow it has been seen to wait for ever, whatever its timeout.
        if group is not None and not ray.wait([group.ready()], timeout=cluster.start_timeout)[0]:
            raise not_free(name, size.workers, size.cpus, size.gpus, cluster)
    except BaseException:  # Ctrl-C as well: nobody else knows the group, and it would take its places later
        release(group)
        raise
    return group


def bundles(cluster: ClusterConfig) -> list[tuple[str, dict[str, float]]]:
    """(pool, what it takes) of each worker for which a trial's placement group has a bundle, behind the trial's own; of
    workers that take nothing there is none."""
    found = []
    for name, pool in (("samplers", cluster.samplers), ("renderers", cluster.renderers)):
        taken = _bundle(pool)
        found += [(name, taken)] * pool.workers if taken else []
    return found


def seats(name: str, workers: int, group: Any, cluster: ClusterConfig) -> list[Any]:
    """Where each worker of a pool starts, as Ray's scheduling strategies: in the group that was reserved for it, within
    a trial each in its own bundle of the trial's group, else (None) wherever there is room.

    Of a group whose bundle is left open Ray takes the resources of any of its bundles on a node. So a small worker
    might start on the node that was reserved for a large one of the other pool, which then would never find room.
    """
    if group is not None:
        return [PlacementGroupSchedulingStrategy(group)] * workers
    trial, all_ = get_current_placement_group(), bundles(cluster)
    own = [number for number, (pool, _) in enumerate(all_, start=1) if pool == name]
    if trial is None or len(own) != workers or trial.bundle_count != len(all_) + 1:
        return [None] * workers
    return [PlacementGroupSchedulingStrategy(trial, number) for number in own]


def may_grow() -> bool:
    """Whether a pool may have more workers than its least number: a trial has places for those alone, and one more
    would wait for the place of a worker that is being replaced, of either pool."""
    return get_current_placement_group() is None


def not_free(name: str, workers: int, cpus: float, gpus: float, cluster: ClusterConfig) -> NotFreeError:
    """The error for places that were waited for in vain, each of `cpus` and `gpus`."""
    free = ray.available_resources()
    return NotFreeError(
        f"{name}: {workers} x ({cpus:g} CPU, {gpus:g} GPU) were not free within {cluster.start_timeout:g} s "
        f"(cluster.start_timeout); free now: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU. `ray status` says "
        "who has the rest"
    )


def release(group: Any) -> None:
    """Gives places back."""
    if group is not None:
        remove_placement_group(group)
