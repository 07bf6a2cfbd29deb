"""Places on the cluster that are had as a whole or not at all, and given back."""

from __future__ import annotations

import uuid
from typing import Any

import ray
from ray.util import get_current_placement_group, placement_group, remove_placement_group

from kka_ray.config.models import ClusterConfig, PoolConfig
from kka_ray.errors import ResourceError


def reserve(name: str, pool: PoolConfig, cluster: ClusterConfig) -> Any:
    """A placement group for the workers of a GPU pool; None for a pool without GPUs and inside a trial, which has one.

    Raises ResourceError if the places are not free within `cluster.start_timeout`.
    """
    if not pool.gpus or get_current_placement_group() is not None:
        return None
    bundle = {"CPU": pool.cpus, "GPU": pool.gpus} if pool.cpus else {"GPU": pool.gpus}
    group = placement_group([bundle] * pool.workers, strategy="PACK", name=f"kka-{name}-{uuid.uuid4().hex[:8]}")
    if not group.wait(cluster.start_timeout):
        remove_placement_group(group)
        free = ray.available_resources()
        raise ResourceError(
            f"{name}: {pool.workers} x ({pool.cpus:g} CPU, {pool.gpus:g} GPU) were not free within "
            f"{cluster.start_timeout:g} s (cluster.start_timeout); free now: {free.get('CPU', 0):g} CPU, "
            f"{free.get('GPU', 0):g} GPU. `ray status` says who has the rest"
        )
    return group


def release(group: Any) -> None:
    """Gives places back."""
    if group is not None:
        remove_placement_group(group)
