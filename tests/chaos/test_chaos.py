"""Whole runs with real small models, whose processes are killed with -9 at random moments.

Every run must end with the result of an undisturbed one. What is random comes of a seed; the moments of course depend
on the machine as well.
"""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from tests.chaos.conftest import Tally
from tests.chaos.killing import PATIENT, WORKERS, assert_all_end, assert_same, disturb, kill_driver, kill_worker
from tests.integration.tiny_run import finish, markers, start
from tests.logical_cluster import assert_nothing_is_left, logical_cluster

LEAST, LEAST_OF_A_KIND = 50, 4
"""Kills in the whole suite, and of each kind of worker."""

PATIENCE = 1800
"""Seconds that a disturbed run may take."""


@pytest.mark.parametrize("seed", [0, 1])
def test_workers_are_killed(undisturbed: Path, folders: Callable[[], Path], tally: Tally, seed: int) -> None:
    """Samplers, renderers and Train workers, wherever they are in loading or working."""
    rng, left = random.Random(seed), 16
    while left > 0:
        folder = folders()
        run = start(folder, *PATIENT)
        root = psutil.Process(run.pid)
        kills = disturb(run, lambda root=root: kill_worker(root, rng), rng, left, 12.0)  # type: ignore[misc]
        finish(run, PATIENCE)
        assert_same(folder, undisturbed)
        tally.add(kills)
        left -= kills.total()


def test_a_kill_of_each_kind_is_borne_by_the_default_configuration(
    undisturbed: Path, folders: Callable[[], Path], tally: Tally
) -> None:
    """Where the attempts and restarts are those that users have."""
    folder, left, rng = folders(), set(WORKERS), random.Random(5)
    run = start(folder)
    root = psutil.Process(run.pid)

    def strike() -> str | None:
        kind = kill_worker(root, rng, left)
        left.discard(str(kind))
        return kind

    kills = disturb(run, strike, rng, len(WORKERS), 1.0)
    finish(run, PATIENCE)
    assert_same(folder, undisturbed)
    tally.add(kills)
    assert set(kills) == set(WORKERS)


def test_the_driver_is_killed(undisturbed: Path, folders: Callable[[], Path], tally: Tally) -> None:
    """The same command goes on each time and makes nothing twice, and the dead driver leaves no process behind."""
    rng, folder, kills = random.Random(2), folders(), 0
    made: dict[Path, int] = {}
    while kills < 8:
        run = start(folder, *PATIENT)
        try:
            run.wait(timeout=rng.uniform(5, 45))
        except subprocess.TimeoutExpired:
            assert_all_end(kill_driver(run))
            kills += 1
            made |= markers(folder)
        else:
            finish(run, PATIENCE)
            assert_same(folder, undisturbed)
            folder = folders()
    finish(start(folder, *PATIENT), PATIENCE)
    assert_same(folder, undisturbed)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    tally.add(Counter(driver=kills))


@pytest.mark.parametrize("seed", [3, 4])
def test_nodes_are_lost(undisturbed: Path, folders: Callable[[], Path], tally: Tally, seed: int) -> None:
    """Whole nodes with all that they do, and workers on those that are left, while the object stores are full."""
    rng, folder = random.Random(seed), folders()
    small = {"object_store_memory": 80_000_000}
    node = {"num_cpus": 2, **small}
    with logical_cluster([{"num_cpus": 0, **small}, node, node]) as cluster:
        run = start(folder, *PATIENT, f"cluster.address={cluster.address}")
        ray.init(address=cluster.address, log_to_driver=False)
        held: list[object] = []

        def strike() -> str | None:
            # More than the stores hold: objects are spilled, and the run's own must come through.
            held.append(ray.put(np.zeros(20_000_000, np.uint8)))
            del held[:-8]
            if rng.random() < 0.5:
                return kill_worker(psutil.Process(), rng)
            if len(cluster.worker_nodes) < 2:
                return None
            cluster.remove_node(rng.choice(list(cluster.worker_nodes)), allow_graceful=False)
            cluster.add_node(**node)
            return "node"

        kills = disturb(run, strike, rng, 8, 15.0)
        finish(run, PATIENCE)
        held.clear()
        assert_nothing_is_left()
    assert_same(folder, undisturbed)
    tally.add(kills)


def test_enough_of_every_kind_was_killed(undisturbed: Path, folders: Callable[[], Path], tally: Tally) -> None:
    """The last test of the suite makes up for kinds that chance left out."""
    rng = random.Random(6)
    for _ in range(10):
        missing = {kind for kind in WORKERS if tally.kills[kind] < LEAST_OF_A_KIND}
        short = LEAST - tally.kills.total()
        if not missing and short <= 0:
            break
        folder = folders()
        run = start(folder, *PATIENT)
        root, kinds = psutil.Process(run.pid), missing or set(WORKERS)
        strike = partial(kill_worker, root, rng, kinds)
        kills = disturb(run, strike, rng, max(short, LEAST_OF_A_KIND * len(missing)), 4.0)
        finish(run, PATIENCE)
        assert_same(folder, undisturbed)
        tally.add(kills)
    assert tally.kills.total() >= LEAST
    assert min(tally.kills[kind] for kind in WORKERS) >= LEAST_OF_A_KIND
    assert tally.kills["node"] > 0
