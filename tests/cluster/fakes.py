"""Fake workers, which misbehave as their rows tell them."""

from __future__ import annotations

import os
import time
from typing import Any

import ray

from kka_ray.cluster.leases import open_store
from kka_ray.cluster.pool import Pool, Task
from kka_ray.config.models import ClusterConfig, PoolConfig
from kka_ray.errors import ConfigError


class FakeWorker:
    """A row is (id, what happens): `ok`, `slow`, `crash`, `hang`, `nan`, `break`, `mistake` or `lease`.

    A `lease` is waited for, on an output of its id in stage `fakes`. With ` once` behind it, what happens does so once
    and leaves a mark in `folder`. After `break` the worker fails whatever it is given. Rows of a `crowd` fail when they
    are more than two. The result is each row's id and its failure, if any.
    """

    def __init__(self, folder: str = "", start: str = "ok") -> None:
        self.folder, self.start = folder, start
        self.broken = False

    def load(self) -> None:
        self.broken = self.start == "broken"
        if self.start == "crash":
            os._exit(1)
        if self.start == "mistake":
            raise ConfigError("no such model")
        if self.start in ("full", "second full"):
            number = sum(name.startswith("loaded") for name in os.listdir(self.folder))
            open(f"{self.folder}/loaded-{number}", "w").close()
            if self.start == "full" or number == 1:
                raise RuntimeError("no memory is free")

    def work(self, task: Task) -> dict[str, str]:
        if self.broken and any(id_ not in task.failed for id_, _ in task.rows):
            raise RuntimeError("the engine is dead")
        for id_, what in task.rows:
            if id_ in task.failed:
                continue
            if what.endswith(" once"):
                mark = f"{self.folder}/{id_}"
                if os.path.exists(mark):
                    continue
                open(mark, "w").close()
            if what.startswith("crash"):
                os._exit(1)
            if what.startswith("hang"):
                time.sleep(3600)
            if what == "slow":
                time.sleep(0.3)
            if what.startswith("break"):
                self.broken = True
                raise RuntimeError("the engine is dead")
            if what == "nan":
                raise FloatingPointError("not finite")
            if what == "mistake":
                raise ConfigError("a user's mistake")
            if what == "lease":
                with open_store(self.folder).lease("fakes", id_):
                    pass
        if len(task.rows) > 2 and {what for _, what in task.rows} == {"crowd"}:
            raise MemoryError("too many at once")
        return {id_: task.failed.get(id_, "") for id_, _ in task.rows}

    def probe(self, task: Task) -> None:
        self.work(task)

    def sleep(self) -> None:
        if self.start == "sleepless":
            time.sleep(3600)


class Placed(FakeWorker):
    """One that is started as the pools' own workers are, with threads and a device."""

    def __init__(self, threads: int, device: str) -> None:
        super().__init__()


def pool(folder: Any = "", start: str = "ok", workers: int = 1, most: int | None = None, **limits: Any) -> Pool:
    actor = ray.remote(num_cpus=0.1)(FakeWorker)
    size = PoolConfig(workers=workers, max_workers=most)
    return Pool("fakes", lambda seat: actor.remote(str(folder), start), size, ClusterConfig(**limits))


def rows(*kinds: str) -> Task:
    return Task(rows=tuple((f"{i}-{kind.split()[0]}", kind) for i, kind in enumerate(kinds)))
