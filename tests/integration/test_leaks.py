"""What runs and jobs leave on a cluster that lives on: nothing, whether they finish, fail or are interrupted."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from kka_ray.cluster import train
from kka_ray.cluster.session import session
from kka_ray.config.models import ClusterConfig
from kka_ray.errors import ConfigError, StageError
from tests.chaos.killing import workers
from tests.integration.failing_jobs import die, die_once, mistake
from tests.integration.tiny_run import finish, models_are_missing, start
from tests.logical_cluster import assert_nothing_is_left, logical_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(models_are_missing(), reason="the built-in models are missing: run `kka setup`"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    nodes = [{"num_cpus": 2}, {"num_cpus": 1, "num_gpus": 1}]
    with logical_cluster(nodes) as made, session(ClusterConfig(address=made.address)):
        yield made


def test_jobs_that_fail_leave_nothing(cluster: Cluster, tmp_path: Path) -> None:
    limits = ClusterConfig(train_cpus=0.5, max_restarts=1)
    with pytest.raises(ConfigError, match="a user's mistake"):
        train.run("mistake", mistake, {}, 2, limits)
    with pytest.raises(StageError, match="job die failed"):
        train.run("die", die, {}, 1, limits)
    train.run("die_once", die_once, {"mark": str(tmp_path / "mark")}, 1, limits)
    assert (tmp_path / "mark").exists()
    assert_nothing_is_left()


def test_a_run_that_fails_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    unusable = ("describe.guard.min_words=39", "describe.guard.max_words=40")
    run = start(tmp_path, f"cluster.address={cluster.address}", *unusable)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 2, output
    assert_nothing_is_left()


def test_a_run_that_is_interrupted_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    run = start(tmp_path, f"cluster.address={cluster.address}")
    deadline = time.monotonic() + 300
    while "sampler" not in workers(psutil.Process()):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=120)
    assert run.returncode
    assert_nothing_is_left()


def test_stages_take_turns_on_one_gpu(cluster: Cluster, tmp_path: Path) -> None:
    """One logical GPU, a whole one for each of samplers, renderers and training: colocated, computed on the CPU."""
    whole = [f"cluster.{pool}={{cpus: 0, gpus: 1}}" for pool in ("samplers", "renderers")]
    turns = ["cluster.mode=colocated", "cluster.device=cpu", "cluster.train_gpus=1", "cluster.train_cpus=0.5"]
    address = f"cluster.address={cluster.address}"
    refused = start(tmp_path / "disjoint", address, *whole, *turns[1:])
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "does not fit" in output
    finish(start(tmp_path / "colocated", address, *whole, *turns))
    assert_nothing_is_left()
