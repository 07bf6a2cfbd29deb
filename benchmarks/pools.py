"""Rows of `throughput.py` about the pools: their overhead, overlap of stages, scaling, and what a whole run spends on
anything but its stages."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from kka_ray.cluster.pool import Pool, Task, drain
from kka_ray.cluster.session import session
from kka_ray.cluster.workers import RenderTask, RenderWorker, start
from kka_ray.config import load
from kka_ray.config.models import BackboneConfig, ClusterConfig, PoolConfig, RenderConfig, RunConfig
from kka_ray.features.backbone import Backbone
from kka_ray.render.index import pipeline_identity

# isort: split
import ray

ROOT = Path(__file__).parents[1]


# --- overhead -----------------------------------------------------------------------------------------------------


class _BareLoop(RenderWorker):
    """The stage without the pool: one call draws all chunks, one after the other, and keeps nothing."""

    def draw_all(self, tasks: list[RenderTask]) -> float:
        """Seconds for all chunks."""
        started = time.perf_counter()
        for task in tasks:
            self.probe(task)
        return time.perf_counter() - started


def pool_overhead(chunks: int = 6, turns: int = 5) -> dict[str, Any]:
    """Drawing through the pool (one worker, its chunks committed to a store) over the bare stage in a loop.

    Both have one process of the same kind, and take turns; the median over the turns of their ratio less 1.
    """
    config, backbone, size = RenderConfig(steps=10), BackboneConfig(image_size=64), PoolConfig()
    identities = {
        "model": pipeline_identity(config.pipeline),
        "features": {"backbone": Backbone.load(backbone).identity},
    }
    with tempfile.TemporaryDirectory() as store, session(ClusterConfig()):
        bare = start(_BareLoop, size, "cpu", None, store, config, backbone, False)
        ray.get(bare.load.remote())
        pool = Pool(
            "renderers",
            lambda group: start(RenderWorker, size, "cpu", group, store, config, backbone, False),
            size,
            ClusterConfig(),
        )
        ratios = []
        for turn in range(turns + 1):
            tasks = [_render_task(config.chunk, turn * chunks + k, identities) for k in range(chunks)]
            alone = ray.get(bare.draw_all.remote(tasks))
            started = time.perf_counter()
            for number, task in enumerate(tasks):
                pool.submit(number, task)
            assert len(list(drain([pool]))) == chunks
            ratios.append((time.perf_counter() - started) / alone)
        pool.stop()
    ratios = ratios[1:]  # in the first one the pool's worker was still loading
    return {"pool_overhead": statistics.median(ratios) - 1, "pool_overhead_turns": [r - 1 for r in ratios]}


def _render_task(rows: int, number: int, identities: dict[str, Any]) -> RenderTask:
    texts = ("a red flower with five petals", "a small blue flower with a yellow centre")
    return RenderTask(
        rows=tuple((f"{number}-{i}", texts[i % 2], number * 1000 + i) for i in range(rows)),
        round=0,
        normals=None,
        inputs={"chunk": number, **identities},
    )


# --- simulated devices ----------------------------------------------------------------------------------------------


class _Simulator:
    """Simulated devices of several workers in one process: a row (id, seconds) takes that long and computes nothing."""

    def __init__(self) -> None:
        self._busy: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def load(self, lane: int) -> None:
        """A simulated device is ready at once."""

    async def work(self, lane: int, task: Task) -> float:
        """A worker does one chunk at a time, in the order in which it gets them."""
        seconds = sum(row[1] for row in task.rows)
        async with self._busy[lane]:
            await asyncio.sleep(seconds)
        return seconds


@dataclass(frozen=True)
class _Method:
    method: Any
    lane: int

    def remote(self, *arguments: Any) -> Any:
        return self.method.remote(self.lane, *arguments)


class _SimulatedPool(Pool):
    """The dispatcher as it is; only the end differs, as workers share their processes."""

    def stop(self) -> None:
        self._workers.clear()
        self._owner.clear()


def _simulated(name: str, workers: int, processes: list[Any]) -> Pool:
    lanes = itertools.count()

    def make(group: Any) -> Any:
        lane = next(lanes)
        process = processes[lane % len(processes)]
        return SimpleNamespace(load=_Method(process.load, lane), work=_Method(process.work, lane))

    return _SimulatedPool(name, make, PoolConfig(workers=workers), ClusterConfig())


def _processes(count: int) -> list[Any]:
    simulator = ray.remote(num_cpus=0)(_Simulator)
    made = [simulator.remote() for _ in range(count)]
    ray.get([process.load.remote(0) for process in made])
    return made


def overlap(chunks: int = 24, seconds: float = 0.5) -> dict[str, Any]:
    """Three stages streamed over the sum of the three one after another: simulated device times, equal for each stage.

    Describing, drawing and what is done with each drawn image, each with a worker of its own.
    """
    tasks = [Task(rows=((str(i), seconds),)) for i in range(chunks)]
    with session(ClusterConfig()):
        names = ("describe", "render", "judge")
        stages = [_simulated(name, 1, _processes(1)) for name in names]
        apart = 0.0
        for stage in stages:
            started = time.perf_counter()
            for i, task in enumerate(tasks):
                stage.submit(i, task)
            assert len(list(drain([stage]))) == chunks
            apart += time.perf_counter() - started
        started, judged = time.perf_counter(), 0
        for i, task in enumerate(tasks):
            stages[0].submit(i, task)
        for stage, number, _ in drain(stages):
            following = stages.index(stage) + 1
            if following < len(stages):
                stages[following].submit(number, tasks[number])
            else:
                judged += 1
        streamed = time.perf_counter() - started
    assert judged == chunks
    return {
        "overlap": streamed / apart,
        "overlap_details": {
            "devices": "simulated",
            "chunks": chunks,
            "seconds_a_chunk_and_stage": seconds,
            "one_after_another": apart,
            "streamed": streamed,
            "best_possible": (chunks + 2) / (3 * chunks),
        },
    }


def scaling(items: int = 60, mean: float = 1.0, sigma: float = 0.7) -> dict[str, Any]:
    """Throughput of the dispatcher with 1 to 256 workers over the ideal: simulated workers in at most 8 processes.

    A worker gets `items` chunks on average, whose times are log-normal (long-tailed) with a mean of `mean` seconds.
    Ideal is the sum of the times over the number of workers.
    """
    rows = {}
    with session(ClusterConfig()):
        processes = _processes(8)
        for workers in (1, 4, 16, 64, 256):
            rng = np.random.default_rng(workers)
            times = rng.lognormal(-(sigma**2) / 2, sigma, items * workers) * mean
            pool = _simulated("simulated", workers, processes)
            wall, cpu = time.perf_counter(), time.process_time()
            for i, seconds in enumerate(times.tolist()):
                pool.submit(i, Task(rows=((str(i), seconds),)))
            done = sum(1 for _ in drain([pool]))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            pool.stop()
            assert done == len(times)
            rows[str(workers)] = {
                "of_ideal": float(times.sum()) / workers / wall,
                "chunks": done,
                "mean_seconds": float(times.mean()),
                "longest_seconds": float(times.max()),
                "driver_ms_a_chunk": 1000 * cpu / done,
            }
    return {
        "scaling_64": rows["64"]["of_ideal"],
        "scaling_256": rows["256"]["of_ideal"],
        "scaling_details": {"devices": "simulated", "processes": 8, "workers": rows},
    }


# --- a whole run ----------------------------------------------------------------------------------------------------


def orchestration_share(config: str = "configs/demo.yaml", overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """The part of a run's wall time in which no stage computes: the demo with its three rounds, nothing in the store.

    A stage computes from the start of each of its outputs to their commit, and while the driver judges. What is left is
    starting Ray, its workers and jobs, loading models, waiting, and writing the run's folder.
    """
    from kka_ray.experiment import run

    spans: list[tuple[float, float]] = []
    begun: dict[tuple[str, int], float] = {}

    def progress(stage: str, number: int, done: int, total: int) -> None:
        if stage in ("judge", "audit") and done == 0:
            begun[stage, number] = time.time()
        elif (stage, number) in begun and done == total:
            spans.append((begun.pop((stage, number)), time.time()))

    with tempfile.TemporaryDirectory() as folder:
        options = [f"output={folder}/runs", f"store.uri={folder}/store", *overrides]
        started = time.time()
        finished = run(load(ROOT / config, RunConfig, options), progress, print)
        wall = time.time() - started
        seconds: dict[str, float] = defaultdict(float)
        for marker in Path(folder, "store").glob("*/*/committed.json"):
            took, end = json.loads(marker.read_text())["seconds"], marker.stat().st_mtime
            spans.append((end - took, end))
            seconds[marker.parts[-3]] += took
        rounds = len(finished.summary["rounds"])
    return {
        "orchestration_share": 1 - _covered(spans) / wall,
        "orchestration_details": {
            "config": config,
            "rounds": rounds,
            "wall_seconds": wall,
            "seconds_of_all_workers": {k: round(v, 1) for k, v in sorted(seconds.items())},
        },
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, end = 0.0, float("-inf")
    for start_, stop in sorted(spans):
        total += max(0.0, stop - max(start_, end))
        end = max(end, stop)
    return total
