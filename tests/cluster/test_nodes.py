"""Pools on a cluster of several nodes with logical GPUs, and what they leave behind. The workers are fakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kka_ray.cluster import streaming
from kka_ray.cluster.placement import bundles, release
from kka_ray.cluster.plan import make_plan
from kka_ray.cluster.pool import Pool, drain
from kka_ray.cluster.session import nodes, session
from kka_ray.cluster.streaming import Pools
from kka_ray.cluster.workers import start
from kka_ray.config.models import ClusterConfig, FlowersData, PoolConfig, RunConfig
from kka_ray.errors import ResourceError, StageError
from tests.cluster import fakes
from tests.logical_cluster import assert_nothing_is_left, logical_cluster, wait_for


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    gpus = {"num_cpus": 1, "num_gpus": 2}
    with logical_cluster([{"num_cpus": 2}, gpus, gpus]) as made, session(ClusterConfig(address=made.address)):
        yield made


@ray.remote
def trial(config: ClusterConfig) -> list[str]:
    """What the pools of a trial do that has its placement group; the pool of small workers starts first."""

    def made(name: str, size: PoolConfig) -> Pool:
        return Pool(name, lambda seat: start(fakes.Placed, size, "cpu", seat), size, config)

    done = []
    pools = [made("renderers", config.renderers), made("samplers", config.samplers)]
    try:
        for pool in pools:
            for i in range(12):
                pool.submit(i, fakes.rows("slow"))
        for pool, _, _ in drain(pools):
            done.append(f"{len(pool._workers)} {pool.name}")
    finally:
        for pool in pools:
            pool.stop()
    return done


def gpu_pool(workers: int, gpus: float = 1, most: int | None = None, **limits: object) -> Pool:
    size = PoolConfig(workers=workers, max_workers=most, gpus=gpus, cpus=0)
    actor = ray.remote(num_cpus=0, num_gpus=gpus)(fakes.FakeWorker)

    def begin(seat: object) -> object:
        return actor.options(scheduling_strategy=seat).remote()

    return Pool("fakes", begin, size, ClusterConfig(**limits))  # type: ignore[arg-type]


def test_a_finished_and_a_failed_pool_leave_nothing(cluster: Cluster) -> None:
    pool = gpu_pool(4)
    for i in range(12):
        pool.submit(i, fakes.rows("ok"))
    assert len(list(drain([pool]))) == 12
    assert ray.available_resources().get("GPU", 0) == 0
    pool.stop()
    assert_nothing_is_left()

    broken = gpu_pool(2, chunk_attempts=1, max_restarts=0)
    broken.submit(0, fakes.rows("crowd", "crowd", "crowd"))
    with pytest.raises(StageError):
        list(drain([broken]))
    broken.stop()
    assert_nothing_is_left()


@pytest.mark.parametrize(("most", "most_busy"), [(3, 3), (6, 4)])
def test_a_pool_grows_into_the_gpus_that_are_free(cluster: Cluster, most: int, most_busy: int) -> None:
    pool = gpu_pool(2, most=most)
    for i in range(60):
        pool.submit(i, fakes.rows("slow"))
    ready, done = set(), set()
    for _, number, _ in drain([pool], poll=0.1):
        done.add(number)
        ready.add(sum(worker.loading is None for worker in pool._workers))
    assert done == set(range(60))
    assert max(ready) == most_busy
    assert len(pool._workers) == 2
    wait_for(lambda: ray.available_resources().get("GPU") == 2, lambda: f"free: {ray.available_resources()}")
    pool.stop()
    assert_nothing_is_left()


def test_a_growing_pool_that_is_stopped_leaves_nothing(cluster: Cluster) -> None:
    pool = gpu_pool(2, most=6)
    for i in range(60):
        pool.submit(i, fakes.rows("slow"))
    for _ in drain([pool], poll=0.1):
        if len(pool._workers) == 5:  # the fifth has no place
            break
    pool.stop()
    assert_nothing_is_left()


def test_the_workers_of_a_trial_start_in_the_bundles_that_are_theirs(cluster: Cluster) -> None:
    """Two GPUs are on one node, one is on the other: a small worker is not to take the place of the large one."""
    large, small = PoolConfig(gpus=2, cpus=0), PoolConfig(gpus=1, cpus=0, max_workers=2)
    config = ClusterConfig(samplers=large, renderers=small, start_timeout=10)
    group = placement_group([{"CPU": 0.25}, *(taken for _, taken in bundles(config))])
    assert group.wait(30)
    seat = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    try:
        done = ray.get(trial.options(num_cpus=0.25, scheduling_strategy=seat).remote(config))
    finally:
        remove_placement_group(group)
    assert Counter(done) == {"1 samplers": 12, "1 renderers": 12}, "a trial has no place for more workers"
    assert_nothing_is_left()


def test_places_that_are_taken_are_said_to_be(cluster: Cluster) -> None:
    first, second = gpu_pool(3), gpu_pool(2, start_timeout=2)
    first.submit(0, fakes.rows("ok"))
    with pytest.raises(ResourceError, match=r"2 x \(0 CPU, 1 GPU\) were not free within 2 s .*1 GPU"):
        second.submit(0, fakes.rows("ok"))
    first.stop()
    assert_nothing_is_left()


def test_a_plan_is_placed_on_the_nodes(cluster: Cluster) -> None:
    config = RunConfig(
        name="x",
        data=FlowersData(kind="flowers"),
        cluster=ClusterConfig(samplers=PoolConfig(workers=2, gpus=1, cpus=0), train_gpus=2),
    )
    places = make_plan(config).place(nodes())
    assert sum(places["describe, render and prefer", "samplers"].values()) == 2
    assert len(places["describe, render and prefer", "DPO workers"]) == 1


@pytest.fixture
def pools_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pools]:
    """The pools of a run with these settings of the cluster; their workers are fakes."""

    def made(**cluster: Any) -> Pools:
        config = RunConfig(name="x", data=FlowersData(kind="flowers"), cluster=ClusterConfig(**cluster))
        make_plan(config).check(nodes())
        return Pools(config, "store")

    def begin(cls: type, size: PoolConfig, device: str, seat: Any, *_: Any) -> Any:
        return start(fakes.Placed, size, device, seat)

    monkeypatch.setattr(streaming, "start", begin)
    return made


@pytest.mark.parametrize(
    ("each", "dpo"),
    [
        (PoolConfig(gpus=1, cpus=0), {"GPU": 2.0, "CPU": 0.5}),
        (PoolConfig(cpus=0.5), {"CPU": 2.0}),
    ],
)
def test_dpo_workers_find_room_beside_smaller_workers(
    cluster: Cluster, pools_of: Callable[..., Pools], each: PoolConfig, dpo: dict[str, float]
) -> None:
    """Ray would put the sampler and the renderer on two nodes, and leave none with enough."""
    pools = pools_of(samplers=each, renderers=each, train_cpus=dpo["CPU"], train_gpus=dpo.get("GPU", 0))
    job = None
    try:
        pools.open()
        ray.get([worker.loading for pool in (pools.samplers, pools.renderers) for worker in pool._workers], timeout=60)
        pools.let_dpo_in()
        pools.open()  # once more, as a loop does: they are not kept again
        job = placement_group([dpo])  # as Ray Train asks for them
        assert job.wait(30)
    finally:
        release(job)
        pools.close()
    assert_nothing_is_left()


def test_a_run_whose_dpo_workers_find_no_places_ends_before_its_pools_start(
    cluster: Cluster, pools_of: Callable[..., Pools]
) -> None:
    others = placement_group([{"GPU": 1.0}] * 2, strategy="STRICT_SPREAD")
    assert others.wait(30)
    pools = pools_of(train_gpus=2, train_cpus=0, start_timeout=2)
    try:
        with pytest.raises(ResourceError, match=r"DPO workers: 1 x \(0 CPU, 2 GPU\) were not free within 2 s"):
            pools.open()
        assert pools.samplers._workers == []
    finally:
        release(others)
        pools.close()
    assert_nothing_is_left()


def test_places_that_dpo_never_took_are_given_back(cluster: Cluster, pools_of: Callable[..., Pools]) -> None:
    pools = pools_of(train_gpus=2, train_cpus=0)
    try:
        pools.open()
        wait_for(lambda: ray.available_resources().get("GPU") == 2, lambda: f"free: {ray.available_resources()}")
    finally:
        pools.close()
    assert_nothing_is_left()


def test_a_pool_goes_on_without_a_lost_node(cluster: Cluster) -> None:
    """The last test of this file: the node stays lost."""
    pool = gpu_pool(4)
    for i in range(40):
        pool.submit(i, fakes.rows("ok"))
    numbers = []
    for _, number, _ in drain([pool]):
        numbers.append(number)
        if len(numbers) == 5:
            cluster.remove_node(list(cluster.worker_nodes)[-1], allow_graceful=False)
    assert sorted(numbers) == list(range(40))
    pool.stop()
