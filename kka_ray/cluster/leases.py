"""Leases on outputs in the making, so that two trials that want the same one do not both make it.

One actor of the job keeps the ledger. A holder beats every few seconds from a thread of its process, so a lease whose
process died runs out by itself and the next in line makes the output. Leases save work and guard nothing: of two
attempts at the same output the store keeps the first.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from kka_ray.store import Store

log = logging.getLogger(__name__)
EXPIRY = 60.0
"""Seconds without a beat after which a lease is free."""
BEAT = 10.0
"""Seconds between two beats."""
_NAME = "kka-leases"


@dataclass
class Ledger:
    """Who is making what."""

    expiry: float = EXPIRY
    clock: Callable[[], float] = time.monotonic
    _leases: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)
    _refused: dict[str, float] = field(default_factory=dict)
    """When each actor that waited for a lease was last refused it, by the actor's id."""

    def acquire(self, stage: str, key: str, holder: str, waiting: str = "") -> bool:
        """Whether `holder` has the lease now: it was free, has run out, or was the holder's already.

        `waiting` is the id of an actor that does nothing else until it has the lease.
        """
        now = self.clock()
        there = self._leases.get((stage, key))
        if there is not None and there[0] != holder and now - there[1] <= self.expiry:
            if waiting:
                self._refused[waiting] = now
            return False
        self._leases[stage, key] = (holder, now)
        return True

    def release(self, stage: str, key: str, holder: str) -> None:
        """Frees the lease, unless it has run out and gone to another."""
        if self._leases.get((stage, key), ("", 0.0))[0] == holder:
            del self._leases[stage, key]

    def waited(self, actor: str) -> float:
        """Seconds since an actor waited for a lease; infinite for one that never did."""
        return self.clock() - self._refused.get(actor, -math.inf)


class Leases:
    """Hands out leases in one process. `call(method, *arguments)` reaches the ledger; `actor` is the process's id if it
    is an actor's."""

    def __init__(self, call: Callable[..., Any], *, actor: str = "", poll: float = 0.5, beat: float = BEAT) -> None:
        self._call, self._actor, self._poll, self._beat = call, actor, poll, beat

    @contextmanager
    def __call__(self, stage: str, key: str) -> Iterator[None]:
        """Waits for the lease on an output and holds it within the block.

        If the ledger fails meanwhile, or gives the lease to another, that is a warning: what is being made is as good.
        """
        lease = (stage, key, uuid.uuid4().hex)
        while not self._call("acquire", *lease, self._actor):
            time.sleep(self._poll)
        done = threading.Event()
        beating = threading.Thread(target=self._keep, args=(done, lease), name="kka-lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            done.set()
            beating.join()
            self._release(lease)

    def _keep(self, done: threading.Event, lease: tuple[str, str, str]) -> None:
        """Beats until it is done or another has the lease.

        The holder is not stopped for a lost lease: the store keeps the first output whole, so that the worst is work
        done twice, and ending the work would only make that certain.
        """
        while not done.wait(self._beat):
            try:
                held = self._call("acquire", *lease)
            except Exception as error:  # whatever it is: it would end this thread, and nobody waits for that
                log.warning("no beat for the lease on %s/%s, tried again in %g s: %s", *lease[:2], self._beat, error)
                continue
            if not held:
                log.warning("the lease on %s/%s ran out and is another's: it is made twice", *lease[:2])
                return

    def _release(self, lease: tuple[str, str, str]) -> None:
        try:
            self._call("release", *lease)
        except Exception as error:  # the output is made, or an error of its making is under way
            log.warning("the lease on %s/%s was not given back and has to run out: %s", *lease[:2], error)


def start() -> Any:
    """The job's ledger actor, started if need be. It lives as long as the process that started it."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger)
    return actor.options(name=_NAME, get_if_exists=True, scheduling_strategy="DEFAULT").remote()


def open_store(uri: str) -> Store:
    """The store at `uri`, with leases where this process's job has a ledger."""
    ledger = _ledger()
    if ledger is None:
        return Store(uri)

    def call(method: str, *arguments: str) -> Any:
        return ray.get(getattr(ledger, method).remote(*arguments))

    return Store(uri, leases=Leases(call, actor=ray.get_runtime_context().get_actor_id() or ""))


def waited(actor: Any) -> float:
    """Seconds since an actor waited for a lease; infinite for one that never did, and where nobody can tell."""
    ledger = _ledger()
    if ledger is None:
        return math.inf
    try:
        return float(ray.get(ledger.waited.remote(actor._actor_id.hex()), timeout=BEAT))
    except RayError as error:
        log.warning("the ledger of leases does not say who waits: %s", str(error).splitlines()[0])
        return math.inf


def _ledger() -> Any:
    """The job's ledger; None where it has none."""
    if not ray.is_initialized():
        return None
    try:
        return ray.get_actor(_NAME)
    except ValueError:
        return None
