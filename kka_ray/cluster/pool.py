"""Pools of long-lived actors that work off chunks, with a bounded number of chunks in flight.

A chunk is a task with a number. Results come back as they are ready; the numbers say which they are. An actor that
dies is started again by Ray and its chunks are done anew; a chunk that takes longer than the limit has its actor
killed, which comes to the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from kka_ray.errors import KkaError, StageError


@dataclass
class _Running:
    number: int
    worker: int
    started: float | None = None


@dataclass
class Pool:
    """Actors made by `make_actor`, each with a method `work(task)`.

    Args:
        name: what the pool does, for messages.
        make_actor: starts an actor; called once a worker.
        workers: number of actors.
        in_flight: chunks that an actor may have at a time, the one it works on included.
        timeout: seconds that a chunk may take.
    """

    name: str
    make_actor: Callable[[], Any]
    workers: int
    in_flight: int
    timeout: float
    _actors: list[Any] = field(default_factory=list)
    _waiting: deque[tuple[int, Any]] = field(default_factory=deque)
    _running: dict[Any, _Running] = field(default_factory=dict)

    def submit(self, number: int, task: Any) -> None:
        """Queues a chunk. The actors start with the first one."""
        self._start()
        self._waiting.append((number, task))
        self._fill()

    @property
    def actors(self) -> list[Any]:
        """The actors, for calls outside the queue."""
        self._start()
        return list(self._actors)

    @property
    def busy(self) -> bool:
        """Whether any chunk is queued or in flight."""
        return bool(self._waiting or self._running)

    @property
    def references(self) -> list[Any]:
        """The object references of the chunks in flight."""
        return list(self._running)

    def take(self, reference: Any) -> tuple[int, Any]:
        """The number and result of a chunk that `ray.wait` found ready. Raises StageError if the chunk failed."""
        running = self._running.pop(reference)
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, KkaError):
                raise cause from None
            raise StageError(f"{self.name}: chunk {running.number} failed: {error}") from error
        except RayActorError as error:
            raise StageError(
                f"{self.name}: chunk {running.number} was lost although its worker was started again as often as "
                f"cluster.max_restarts allows: {error}"
            ) from error
        self._fill()
        return running.number, result

    def end_hung(self) -> None:
        """Kills the actor of a chunk that has been worked on for longer than the limit; Ray starts it again."""
        now = time.monotonic()
        first: dict[int, _Running] = {}
        for running in self._running.values():
            first.setdefault(running.worker, running)
        for worker, running in first.items():
            if running.started is None:
                running.started = now
            elif now - running.started > self.timeout:
                running.started = now
                ray.kill(self._actors[worker], no_restart=False)

    def stop(self) -> None:
        """Ends the actors and forgets what they were doing."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
        self._waiting.clear()
        self._running.clear()

    def _start(self) -> None:
        if not self._actors:
            self._actors = [self.make_actor() for _ in range(self.workers)]

    def _fill(self) -> None:
        load = [0] * len(self._actors)
        for running in self._running.values():
            load[running.worker] += 1
        while self._waiting:
            worker = min(range(len(load)), key=load.__getitem__)
            if load[worker] >= self.in_flight:
                return
            number, task = self._waiting.popleft()
            self._running[self._actors[worker].work.remote(task)] = _Running(number, worker)
            load[worker] += 1


def drain(pools: Sequence[Pool], poll: float = 5.0) -> Iterator[tuple[Pool, int, Any]]:
    """(pool, chunk number, result) of every chunk as it is ready, until all pools are idle.

    The caller may submit more chunks, to any of the pools, between two results: so one stage feeds the next.
    """
    while any(pool.busy for pool in pools):
        owner = {reference: pool for pool in pools for reference in pool.references}
        ready, _ = ray.wait(list(owner), num_returns=1, timeout=poll)
        for reference in ready:
            number, result = owner[reference].take(reference)
            yield owner[reference], number, result
        for pool in pools:
            pool.end_hung()
