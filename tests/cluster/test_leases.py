"""Leases: one maker at a time, and none that is kept by the dead."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.exceptions import ActorUnavailableError

from kka_ray.cluster.leases import Leases, Ledger
from kka_ray.store import Attempt, Store


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def leases(ledger: Ledger, fails: Callable[[str], bool] = lambda method: False, **options: float) -> Leases:
    """Leases of a ledger that cannot be reached while `fails(method)`."""
    lock = threading.Lock()

    def call(method: str, *arguments: str) -> object:
        if fails(method):
            raise ActorUnavailableError("the ledger is away", None)
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


def test_the_ledger_knows_how_long_ago_an_actor_waited() -> None:
    clock = Clock()
    ledger = Ledger(clock=clock)
    assert ledger.acquire("render", "k", "a", "first")
    clock.now = 5
    assert not ledger.acquire("render", "k", "b", "second")
    assert not ledger.acquire("render", "k", "c")
    clock.now = 7
    assert [ledger.waited(actor) for actor in ("first", "second")] == [math.inf, 2]


def test_a_holder_beats_for_as_long_as_it_holds() -> None:
    ledger = Ledger(expiry=0.15)
    with leases(ledger, beat=0.02)("fit", "k"):
        time.sleep(0.4)
        assert not ledger.acquire("fit", "k", "another")
    assert ledger.acquire("fit", "k", "another")


def test_a_holder_beats_on_after_the_ledger_failed(caplog: pytest.LogCaptureFixture) -> None:
    ledger, away = Ledger(expiry=0.3), threading.Event()
    with leases(ledger, lambda method: away.is_set(), beat=0.02)("fit", "k"):
        away.set()
        time.sleep(0.1)
        away.clear()
        time.sleep(0.5)
        assert not ledger.acquire("fit", "k", "another")
    assert "no beat for the lease on fit/k" in caplog.text
    assert ledger.acquire("fit", "k", "another")


def test_a_lost_lease_is_told_and_costs_no_output(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    store = Store(str(tmp_path), leases=leases(ledger, beat=0.02))

    def make(attempt: Attempt) -> None:
        ledger._leases = {key: ("another", ledger.clock()) for key in ledger._leases}
        time.sleep(0.1)
        attempt.json(7, "value")

    assert store.get_or_make("x", 1, {}, make).json("value") == 7
    assert "ran out and is another's" in caplog.text
    assert [holder for holder, _ in ledger._leases.values()] == ["another"]


@pytest.mark.parametrize("made", [True, False])
def test_a_ledger_that_is_gone_at_the_end_hides_neither_output_nor_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, made: bool
) -> None:
    store = Store(str(tmp_path), leases=leases(Ledger(), lambda method: method == "release"))

    def make(attempt: Attempt) -> None:
        if not made:
            raise ValueError("no")
        attempt.json(7, "value")

    if made:
        assert store.get_or_make("x", 1, {}, make).json("value") == 7
    else:
        with pytest.raises(ValueError, match="no"):
            store.get_or_make("x", 1, {}, make)
    assert "has to run out" in caplog.text


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
