"""Pools of long-lived actors that work off chunks, with a bounded number of chunks in flight.

A chunk is a task with a number. Results come back as they are ready; the numbers say which they are. A worker that
dies is replaced, and its chunks are done anew. A chunk that fails `cluster.chunk_attempts` times, by a crash, by an
exception or by taking longer than `cluster.chunk_timeout`, is searched by halving for the rows at fault, without
keeping what the parts make. Then the whole chunk is done again without those rows: what it makes depends on the chunk
and on the rows at fault alone, and never on who was killed when.

A worker may also live on with an engine that is dead, and fail whatever it is given. So a failure counts only if the
worker was new or had done what it was given last, and one that fails several times in succession is replaced.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

from kka_ray.cluster.leases import waited
from kka_ray.cluster.placement import DIED, ask, may_grow, release, reserve, seats
from kka_ray.config.models import ClusterConfig, PoolConfig
from kka_ray.errors import KkaError, ResourceError, StageError

log = logging.getLogger(__name__)
_SEVERAL = 3
"""Failures in succession after which a worker is replaced."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows that are done together."""

    rows: tuple[tuple[Any, ...], ...]
    """The first field of a row is its id."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Reasons by id of rows that are not to be tried: they become rows with that reason."""

    def part(self, start: int, stop: int) -> Self:
        """The same for some of the rows."""
        return replace(self, rows=self.rows[start:stop])


@dataclass(eq=False)
class _Item:
    """A chunk, or within a search a part of one."""

    number: int
    task: Task
    search: _Search | None = None
    failures: int = 0
    """Those that count."""
    searches: int = 0
    """Times that the chunk was searched without finding a row at fault."""
    reference: Any = None


@dataclass(eq=False)
class _Search:
    """The search for the rows at fault in a chunk."""

    item: _Item
    open: int
    """Parts that are not done with; the chunk itself until it is halved."""
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class _Worker:
    actor: Any
    loading: Any
    """Reference of the call that loads its engine; None once it is ready."""
    since: float
    """When it began to load, or began with the chunk in front; later where that had to wait for a lease first."""
    items: deque[_Item] = field(default_factory=deque)
    """In the order in which it does them."""
    ended: str = ""
    """Why we ended it."""
    failures: list[str] = field(default_factory=list)
    """Reasons of its failures since it was started or last did what it was given."""
    seat: Any = None
    """Where it was started, as Ray's scheduling strategy; one that replaces it is started there as well."""
    group: Any = None
    """The placement group of one that is beyond the pool's least number; it ends with the worker."""


@dataclass
class Pool:
    """Actors with the methods `load()`, `work(task)` and `probe(task)`; `probe` does the work and keeps nothing.

    Args:
        name: what the pool does, for messages.
        make_actor: starts an actor where the scheduling strategy that it is given says; None leaves that to Ray.
        size: number of workers and what each takes. While more chunks wait than the workers can take in two turns there
            are up to `max_workers` of them, if they find places; those beyond `workers` end when nothing is left to do.
        config: limits.
        found: hears of every row at fault: (id, reason). It may raise to end the run.
    """

    name: str
    make_actor: Callable[[Any], Any]
    size: PoolConfig
    config: ClusterConfig
    found: Callable[[str, str], None] = lambda id_, reason: None
    _workers: list[_Worker] = field(default_factory=list)
    _waiting: deque[_Item] = field(default_factory=deque)
    _owner: dict[Any, _Worker] = field(default_factory=dict)
    _group: Any = None
    _bad_starts: int = 0
    """Workers in succession that died or failed before they were ready."""
    _can_start: bool = False
    """Whether any worker was ever ready."""
    _failing: int = 0
    """Workers that were replaced because they failed, since any did what it was given."""
    _idle_since: float = 0.0
    """Since when no worker was ready."""

    def open(self) -> None:
        """Starts the actors, which load while others are busy; else they start with the first chunk."""
        if not self._workers:
            self._group = reserve(self.name, self.size, self.config)
            self._idle_since = time.monotonic()
            places = seats(self.name, self.size.workers, self._group, self.config)
            self._workers = [self._start_worker(seat) for seat in places]

    def submit(self, number: int, task: Task) -> None:
        """Queues a chunk."""
        if not self.busy:  # nobody looked at the workers while there was nothing to do
            self._idle_since = time.monotonic()
        self._waiting.append(_Item(number, task))
        self._fill()

    @property
    def busy(self) -> bool:
        """Whether any chunk is queued or in flight."""
        return bool(self._waiting) or any(w.items for w in self._workers)

    @property
    def references(self) -> list[Any]:
        """What to wait for: the chunks in flight, and the workers that load."""
        return list(self._owner)

    def collect(self) -> list[tuple[int, Any]]:
        """(chunk number, result) of what is ready. Replaces dead and hung workers, and hands out more chunks.

        Raises StageError if workers cannot be started or do nothing but fail, or if a chunk fails for no row's sake,
        ResourceError if none gets a place or its runtime environment, and the errors of ours that a worker raised.
        """
        results = []
        waited_for = self.references
        ready = set(ray.wait(waited_for, num_returns=len(waited_for), timeout=0)[0]) if waited_for else set()
        for worker in list(dict.fromkeys(self._owner[reference] for reference in ready)):
            results += self._look_at(worker, ready)
        self._end_hung()
        self._fill()
        self._resize()
        return results

    def rest(self) -> None:
        """Calls `sleep()` of every worker that is ready: it gives memory back until its next chunk.

        One that is dead, or is killed as it is not asleep within `cluster.chunk_timeout`, has given it back as well and
        is replaced with its next chunk.
        """
        calls = {worker.actor.sleep.remote(): worker for worker in self._workers if worker.loading is None}
        done = ray.wait(list(calls), num_returns=len(calls), timeout=self.config.chunk_timeout)[0] if calls else []
        for call, worker in calls.items():
            if call not in done:
                log.warning("%s: a worker is not asleep after %g s", self.name, self.config.chunk_timeout)
                ray.kill(worker.actor)
                continue
            try:
                ray.get(call)
            except RayTaskError as error:
                log.warning("%s: a worker cannot sleep: %s", self.name, str(error).splitlines()[-1])
                ray.kill(worker.actor)
            except RayError as error:
                log.warning("%s: a worker died while it was idle: %s", self.name, str(error).splitlines()[0])

    def stop(self) -> None:
        """Ends the actors, gives their places back and forgets what they were doing."""
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()
        self._waiting.clear()
        self._owner.clear()
        release(self._group)
        self._group = None

    # --- workers ---

    def _start_worker(self, seat: Any, group: Any = None) -> _Worker:
        """A worker in one of the pool's places, or in a group of its own."""
        actor = self.make_actor(seat)
        worker = _Worker(actor, actor.load.remote(), time.monotonic(), seat=seat, group=group)
        self._owner[worker.loading] = worker
        return worker

    def _end(self, worker: _Worker) -> None:
        """Ends a worker and gives a place of its own back."""
        ray.kill(worker.actor)
        self._owner.pop(worker.loading, None)
        release(worker.group)

    def _look_at(self, worker: _Worker, ready: set[Any]) -> list[tuple[int, Any]]:
        """What a worker has done, in its order, up to where it died if it did."""
        if worker.loading is not None:
            if worker.loading in ready:
                self._loaded(worker)
            return []
        results = []
        while worker.items and worker.items[0].reference in ready:
            item = worker.items[0]
            try:
                result = ray.get(item.reference)
            except DIED as error:
                self._let_go(worker)
                self._failed(worker, item, worker.ended or "the worker's process died")
                self._replace(worker, str(error))
                break
            except RayTaskError as error:
                if isinstance(error.cause, KkaError):
                    raise error.cause from None
                self._let_go(worker)
                self._failed(worker, item, f"{type(error.cause).__name__}: {error.cause}")
                if type(error.cause).__name__ == "AcceleratorError":
                    self._replace(worker, "its device is lost")
                    break
            except RayError as error:  # an argument or a result was lost, as with a node
                self._let_go(worker)
                self._failed(worker, item, f"{type(error).__name__}: {error}")
            else:
                self._let_go(worker)
                if any(row[0] not in item.task.failed for row in item.task.rows):
                    worker.failures.clear()
                    self._failing = 0
                results += self._done(item, result)
            if len(worker.failures) >= _SEVERAL:
                self._give_up(worker)
                break
        else:
            if worker.ended and not worker.items:  # done as it was ended: no chunk is left to tell of its death
                self._replace(worker, worker.ended)
        return results

    def _loaded(self, worker: _Worker) -> None:
        try:
            ray.get(worker.loading)
        except RayTaskError as error:
            if isinstance(error.cause, KkaError):
                raise error.cause from None
            if not self._can_start:
                raise StageError(f"{self.name}: a worker cannot load its model: {error}") from error
            # What the worker before it held may not be free yet, as a GPU's memory.
            self._start_again(worker, error, f"{type(error.cause).__name__}: {error.cause}")
        except RuntimeEnvSetupError as error:
            raise ResourceError(
                f"{self.name}: the packages or variables of cluster.{self.name}.runtime_env cannot be set up: {error}"
            ) from error
        except RayError as error:  # it died, its node did, or Ray ended it for lack of memory
            self._start_again(worker, error, str(error))
        else:
            self._bad_starts, self._can_start = 0, True
            del self._owner[worker.loading]
            worker.loading = None

    def _start_again(self, worker: _Worker, error: RayError, why: str) -> None:
        """Another worker for one that did not start, unless too many before it did not either."""
        self._bad_starts += 1
        if self._bad_starts > self.config.max_restarts:
            raise StageError(
                f"{self.name}: {self._bad_starts} workers in succession died as they started; the last: {why}"
            ) from error
        self._replace(worker, why)

    def _let_go(self, worker: _Worker) -> None:
        """The chunk in front is done with; the next one's time begins."""
        del self._owner[worker.items.popleft().reference]
        worker.since = time.monotonic()

    def _give_up(self, worker: _Worker) -> None:
        """Another worker for one that only fails, unless the ones before it did no better."""
        self._failing += 1
        if self._failing > self.config.max_restarts + self.config.chunk_attempts:
            raise StageError(
                f"{self.name}: {self._failing} workers in succession failed {_SEVERAL} times each and did nothing that "
                f"they were given; the last time: {worker.failures[-1]}"
            )
        self._replace(worker, f"it failed {_SEVERAL} times in succession, the last time by {worker.failures[-1]}")

    def _replace(self, worker: _Worker, why: str) -> None:
        """Another worker for one that is gone or of no use; its chunks are queued again."""
        log.warning("%s: a worker is replaced: %s", self.name, worker.ended or why.splitlines()[0])
        ray.kill(worker.actor)  # it may be unreachable only
        for reference in (worker.loading, *(item.reference for item in worker.items)):
            self._owner.pop(reference, None)
        self._waiting.extendleft(reversed(worker.items))
        self._workers[self._workers.index(worker)] = self._start_worker(worker.seat, worker.group)

    def _end_hung(self) -> None:
        """Kills workers that take too long over a chunk; what becomes of it is seen when their death is."""
        now, limit = time.monotonic(), self.config.chunk_timeout
        for worker in self._workers:
            if worker.items and not worker.ended and now - worker.since > limit:
                # Another trial may have been making the chunk; if that one hangs, its own pool ends it.
                worker.since = max(worker.since, time.monotonic() - waited(worker.actor))
                if now - worker.since > limit:
                    worker.ended = f"not done within {limit:g} s"
                    ray.kill(worker.actor)
        if any(worker.loading is None for worker in self._workers):
            self._idle_since = now
        elif self._workers and self._waiting and now - self._idle_since > self.config.start_timeout:
            raise ResourceError(
                f"{self.name}: no worker was ready within {self.config.start_timeout:g} s. Its place may be taken by "
                "others (`ray status`), or loading takes longer than cluster.start_timeout"
            )

    def _fill(self) -> None:
        """Hands chunks to the workers that have the fewest."""
        if self._waiting:
            self.open()
        ready = [worker for worker in self._workers if worker.loading is None and not worker.ended]
        while self._waiting and ready:
            worker = min(ready, key=lambda w: len(w.items))
            load = len(worker.items)
            # A chunk that waits at a worker cannot go to one that is free sooner: near the end none waits there.
            if load >= self.config.in_flight or (load and len(self._waiting) <= len(self._workers)):
                return
            item = self._waiting.popleft()
            call = worker.actor.probe if item.search else worker.actor.work
            item.reference = call.remote(item.task)
            if not worker.items:
                worker.since = time.monotonic()
            worker.items.append(item)
            self._owner[item.reference] = worker

    def _resize(self) -> None:
        """One more worker while many chunks wait; none beyond the smallest number when there is nothing to do."""
        most, least = self.size.max_workers or self.size.workers, self.size.workers
        if not self.busy:
            for worker in self._workers[least:]:
                self._end(worker)
            del self._workers[least:]
        elif len(self._workers) < most and len(self._waiting) > len(self._workers) * self.config.in_flight:
            if all(worker.loading is None for worker in self._workers) and may_grow():
                group = ask(self.name, self.size, 1)
                [seat] = seats(self.name, 1, group, self.config)
                self._workers.append(self._start_worker(seat, group))

    # --- what fails ---

    def _done(self, item: _Item, result: Any) -> list[tuple[int, Any]]:
        if item.search is None:
            return [(item.number, result)]
        self._close(item.search)
        return []

    def _failed(self, worker: _Worker, item: _Item, reason: str) -> None:
        """Another attempt, or a closer look at the rows. A part of several rows is halved at once: it blames nobody."""
        if item.search is None or len(item.task.rows) == 1:
            item.failures += not worker.failures
            worker.failures.append(reason)
            if item.failures < self.config.chunk_attempts:
                # What comes next may show whether it is the worker's fault, unless it has failed itself.
                behind = 1 if self._waiting and not self._waiting[0].failures else 0
                self._waiting.insert(behind, item)
                return
        search = item.search or _Search(item, open=1)
        if len(item.task.rows) == 1:
            id_ = item.task.rows[0][0]
            search.failed[id_] = reason
            self.found(id_, reason)
        else:
            self._probe(search, item)
        self._close(search)

    def _probe(self, search: _Search, item: _Item) -> None:
        """Queues the halves of a chunk or of a part of it."""
        count = len(item.task.rows)
        for a, b in (((count + 1) // 2, count), (0, (count + 1) // 2)):
            search.open += 1
            self._waiting.appendleft(_Item(item.number, item.task.part(a, b), search))

    def _close(self, search: _Search) -> None:
        """A part is done with. After the last one the whole chunk is done again, without the rows at fault."""
        search.open -= 1
        if search.open:
            return
        item = search.item
        item.failures = 0
        if not search.failed:
            item.searches += 1
            if item.searches > self.config.chunk_attempts:
                raise StageError(
                    f"{self.name}: chunk {item.number} of {len(item.task.rows)} rows fails again and again, although "
                    "none of its rows fails alone; memory that does not suffice for all at once would look like this: "
                    "lower describe.chunk or render.chunk"
                )
        item.task = replace(item.task, failed={**item.task.failed, **search.failed})
        self._waiting.appendleft(item)


def drain(
    pools: Sequence[Pool], poll: float = 1.0, until: Sequence[Pool] | None = None
) -> Iterator[tuple[Pool, int, Any]]:
    """(pool, chunk number, result) of every chunk as it is ready, until all pools are idle, or those of `until`.

    The caller may submit more chunks, to any of the pools, between two results: so one stage feeds the next.
    """
    while any(pool.busy for pool in (pools if until is None else until)):
        references = [reference for pool in pools for reference in pool.references]
        ray.wait(references, num_returns=1, timeout=poll)
        for pool in pools:
            for number, result in pool.collect():
                yield pool, number, result
