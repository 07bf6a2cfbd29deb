"""Leases: one maker at a time, and none that is kept by the dead."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from kka_ray.cluster.leases import Leases, Ledger
from kka_ray.store import Attempt, Store


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def leases(ledger: Ledger, **options: float) -> Leases:
    lock = threading.Lock()

    def call(method: str, *arguments: str) -> object:
        with lock:  # an actor does one call at a time
            return getattr(ledger, method)(*arguments)

    return Leases(call, **options)


def test_a_lease_is_its_holders_until_it_is_released() -> None:
    ledger = Ledger()
    assert ledger.acquire("render", "k", "a")
    assert not ledger.acquire("render", "k", "b")
    assert ledger.acquire("render", "other", "b")
    ledger.release("render", "k", "b")
    assert not ledger.acquire("render", "k", "b"), "only its holder may release it"
    ledger.release("render", "k", "a")
    assert ledger.acquire("render", "k", "b")


def test_a_lease_runs_out_without_beats_and_lasts_with_them() -> None:
    clock = Clock()
    ledger = Ledger(expiry=60, clock=clock)
    ledger.acquire("dpo", "k", "a")
    clock.now = 50
    ledger.acquire("dpo", "k", "a")
    clock.now = 100
    assert not ledger.acquire("dpo", "k", "b")
    clock.now = 111
    assert ledger.acquire("dpo", "k", "b")
    assert not ledger.acquire("dpo", "k", "a"), "what ran out is not taken back"
    ledger.release("dpo", "k", "a")
    assert not ledger.acquire("dpo", "k", "c")


def test_a_holder_beats_for_as_long_as_it_holds() -> None:
    ledger = Ledger(expiry=0.15)
    with leases(ledger, beat=0.02)("fit", "k"):
        time.sleep(0.4)
        assert not ledger.acquire("fit", "k", "another")
    assert ledger.acquire("fit", "k", "another")


def test_two_that_want_the_same_output_make_it_once(tmp_path: Path) -> None:
    ledger, made = Ledger(), []

    def make(attempt: Attempt) -> None:
        made.append(attempt.name)
        time.sleep(0.2)
        attempt.json(len(made), "value")

    stores = [Store(str(tmp_path), leases=leases(ledger, poll=0.01)) for _ in range(3)]
    values = []
    threads = [
        threading.Thread(target=lambda s=s: values.append(s.get_or_make("x", 1, {}, make).json("value")))
        for s in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert values == [1, 1, 1]
    assert len(made) == 1


def test_a_maker_that_fails_leaves_the_lease_to_the_next(tmp_path: Path) -> None:
    ledger = Ledger()
    store = Store(str(tmp_path), leases=leases(ledger, poll=0.01))

    def fail(attempt: Attempt) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.get_or_make("x", 1, {}, fail)
    assert store.get_or_make("x", 1, {}, lambda a: a.json(7, "value")).json("value") == 7
