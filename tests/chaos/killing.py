"""Finds the worker processes of a run and kills them from outside, at seeded random moments."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import psutil

from tests.integration.tiny_run import records, summary

# Ray names its processes after the actor that lives in them.
WORKERS = {"sampler": "ray::SamplerWorker", "renderer": "ray::RenderWorker", "train": "ray::RayTrainWorker"}

# Of all that may be killed, nothing may be taken for the fault of a row or for a job that cannot be had.
PATIENT = ("cluster.chunk_attempts=50", "cluster.max_restarts=50")


def workers(root: psutil.Process) -> dict[str, list[psutil.Process]]:
    """The living workers below a process, by kind."""
    found: dict[str, list[psutil.Process]] = {}
    for process in root.children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:  # it has ended since
            continue
        for kind, title in WORKERS.items():
            if name.startswith(title):
                found.setdefault(kind, []).append(process)
    return found


def kill_worker(root: psutil.Process, rng: random.Random, kinds: Collection[str] = tuple(WORKERS)) -> str | None:
    """Kills one worker of the given kinds; its kind, or None where there was none to kill."""
    there = {kind: found for kind, found in workers(root).items() if kind in kinds}
    if not there:
        return None
    kind = rng.choice(sorted(there))
    try:
        rng.choice(there[kind]).kill()
    except psutil.NoSuchProcess:
        return None
    return kind


def disturb(
    run: subprocess.Popen[str], strike: Callable[[], str | None], rng: random.Random, kills: int, seconds: float
) -> Counter[str]:
    """Strikes up to `kills` times, a random part of `seconds` apart, as long as the run lasts; kills by kind."""
    done: Counter[str] = Counter()
    while done.total() < kills and run.poll() is None:
        time.sleep(rng.uniform(0, seconds))
        kind = strike() if run.poll() is None else None
        if kind:
            done[kind] += 1
    return done


def kill_driver(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """Kills a run's own process with -9; returns the processes that were below it."""
    below = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.communicate()
    return below


def assert_all_end(processes: list[psutil.Process]) -> None:
    """Waits for processes to end. Raises AssertionError if some do not."""
    # Ray's agents try for 60 s to tell the head, which is gone, that their node is.
    _, alive = psutil.wait_procs(processes, timeout=150)
    assert not alive, f"left behind: {alive}"


def assert_same(folder: Path, undisturbed: Path) -> None:
    """A finished run must have the ids, images, verdicts and measures of the undisturbed one, to the last bit."""
    found, wanted = records(folder), records(undisturbed)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == wanted[name], f"the table {name} differs"
    ours, theirs = summary(folder), summary(undisturbed)
    # Where a run is done is part of its configuration, and of nothing else.
    assert ours | {"config_hash": ""} == theirs | {"config_hash": ""}
