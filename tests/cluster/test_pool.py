"""Pools: every chunk is done, the rows at fault are found, and nothing else is touched. The workers are fakes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import OutOfMemoryError, RuntimeEnvSetupError

from kka_ray.cluster import leases
from kka_ray.cluster.pool import Pool, drain
from kka_ray.errors import ConfigError, ResourceError, StageError
from tests.cluster import fakes

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def make() -> Iterator[Any]:
    made: list[Pool] = []

    def make(*arguments: Any, **options: Any) -> Pool:
        made.append(fakes.pool(*arguments, **options))
        return made[-1]

    yield make
    for pool in made:
        pool.stop()


def work(pool: Pool, *tasks: Any) -> dict[int, dict[str, str]]:
    for i, task in enumerate(tasks):
        pool.submit(i, task)
    return {i: result for _, i, result in drain([pool], poll=0.1)}


def test_every_chunk_comes_back_once(make: Any) -> None:
    results = work(make(workers=2), *[fakes.rows("ok", "ok") for _ in range(20)])
    assert results == {i: {"0-ok": "", "1-ok": ""} for i in range(20)}


def test_rows_that_raise_are_found_among_those_that_do_not(make: Any) -> None:
    pool = make()
    found: dict[str, str] = {}
    pool.found = found.__setitem__
    results = work(pool, fakes.rows("ok"), fakes.rows("ok", "nan", "ok", "ok", "nan", "ok", "ok"), fakes.rows("nan"))
    reason = "FloatingPointError: not finite"
    assert results[0] == {"0-ok": ""}
    assert {id_: r for id_, r in results[1].items() if r} == {"1-nan": reason, "4-nan": reason}
    assert len(results[1]) == 7
    assert results[2] == {"0-nan": reason}
    assert found == {"1-nan": reason, "4-nan": reason, "0-nan": reason}


def test_a_row_that_crashes_its_worker_is_found(make: Any) -> None:
    results = work(make(chunk_attempts=1), fakes.rows("crash", "ok"), fakes.rows("ok"))
    assert results == {0: {"0-crash": "the worker's process died", "1-ok": ""}, 1: {"0-ok": ""}}


def test_a_worker_that_dies_by_chance_costs_no_row(make: Any, tmp_path: Path) -> None:
    results = work(make(tmp_path), fakes.rows("ok", "crash once"), fakes.rows("ok"))
    assert results == {0: {"0-ok": "", "1-crash": ""}, 1: {"0-ok": ""}}


def test_a_search_that_finds_no_row_does_the_whole_chunk_again(make: Any, tmp_path: Path) -> None:
    results = work(make(tmp_path, chunk_attempts=1), fakes.rows("ok", "crash once", "ok"))
    assert results == {0: {"0-ok": "", "1-crash": "", "2-ok": ""}}


@pytest.mark.parametrize("attempts", [1, 2])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_dead_engine_costs_no_row(make: Any, tmp_path: Path, workers: int, attempts: int) -> None:
    pool = make(tmp_path, workers=workers, chunk_attempts=attempts)
    pool.found = lambda id_, reason: pytest.fail(f"{id_} was blamed: {reason}")
    tasks = [fakes.rows("ok", "ok"), fakes.rows("ok", "break once", "ok"), *[fakes.rows("ok", "ok") for _ in range(8)]]
    results = work(pool, *tasks)
    assert sorted(results) == list(range(10))
    assert not any(reason for result in results.values() for reason in result.values())


def test_a_row_that_fails_alone_is_blamed_after_as_many_attempts_on_sound_workers(make: Any) -> None:
    results = work(make(max_restarts=1), fakes.rows("nan"), fakes.rows("nan"))
    assert results == {i: {"0-nan": "FloatingPointError: not finite"} for i in range(2)}


def test_one_that_takes_anothers_place_may_fail_to_start_and_the_first_may_not(make: Any, tmp_path: Path) -> None:
    results = work(make(tmp_path, start="second full"), fakes.rows("ok", "crash once"), fakes.rows("ok"))
    assert results == {0: {"0-ok": "", "1-crash": ""}, 1: {"0-ok": ""}}
    assert len(list(tmp_path.glob("loaded-*"))) == 3
    with pytest.raises(StageError, match="(?s)cannot load its model.*no memory is free"):
        work(make(tmp_path, start="full"), fakes.rows("ok"))
    assert len(list(tmp_path.glob("loaded-*"))) == 4


@pytest.mark.slow
def test_workers_that_only_fail_end_the_run(make: Any) -> None:
    pool = make(start="broken", max_restarts=0, chunk_attempts=1)
    with pytest.raises(StageError, match=r"2 workers in succession failed 3 times .*RuntimeError: the engine is dead"):
        work(pool, *[fakes.rows("ok", "ok", "ok", "ok") for _ in range(4)])


@pytest.mark.parametrize(
    ("behind", "reason"), [("ok", ""), pytest.param("hang", "not done within 2 s", marks=pytest.mark.slow)]
)
def test_waiting_for_a_lease_is_no_work_and_hanging_after_it_is_found(
    make: Any, tmp_path: Path, behind: str, reason: str
) -> None:
    ledger = leases.start()
    ray.get(ledger.__ray_ready__.remote())
    pool = make(tmp_path, chunk_attempts=1, chunk_timeout=2)
    with leases.open_store(str(tmp_path)).lease("fakes", "0-lease"):
        pool.submit(0, fakes.rows("lease", behind))
        started, first = None, pool._workers[0].actor
        while started is None or time.monotonic() - started < 4:
            ray.wait(pool.references, timeout=0.1)
            assert pool.collect() == []
            started = started or (time.monotonic() if pool._workers[0].items else None)
        assert pool._workers[0].actor is first
    assert [result for _, _, result in drain([pool], poll=0.1)] == [{"0-lease": "", f"1-{behind}": reason}]
    assert (pool._workers[0].actor is first) == (behind == "ok")
    del ledger


@pytest.mark.slow
def test_a_row_that_hangs_is_found(make: Any) -> None:
    results = work(make(chunk_attempts=1, chunk_timeout=0.5), fakes.rows("hang", "ok"))
    assert results == {0: {"0-hang": "not done within 0.5 s", "1-ok": ""}}


def test_a_worker_that_is_ended_as_it_gets_done_is_replaced(make: Any) -> None:
    """Nothing of it is in flight any more that would tell of its death."""
    pool = make()
    pool.submit(0, fakes.rows("ok"))
    while not pool._workers[0].items:
        ray.wait(pool.references)
        assert pool.collect() == []
    ray.wait(pool.references)
    pool._workers[0].since -= 2 * pool.config.chunk_timeout
    pool._end_hung()
    assert pool.collect() == [(0, {"0-ok": ""})]
    pool.submit(1, fakes.rows("ok"))
    deadline = time.monotonic() + 60
    results = []
    while not results and time.monotonic() < deadline:
        ray.wait(pool.references, timeout=0.1)
        results = pool.collect()
    assert results == [(1, {"0-ok": ""})]


def test_a_chunk_that_fails_only_as_a_whole_ends_the_run(make: Any) -> None:
    with pytest.raises(StageError, match=r"chunk 0 of 4 rows .*none of its rows fails alone"):
        work(make(), fakes.rows("crowd", "crowd", "crowd", "crowd"))


def test_a_mistake_of_the_user_is_passed_on_as_it_is(make: Any) -> None:
    with pytest.raises(ConfigError, match="a user's mistake"):
        work(make(), fakes.rows("ok", "mistake"))


def test_a_model_that_cannot_be_loaded_says_so(make: Any) -> None:
    with pytest.raises(ConfigError, match="no such model"):
        work(make(start="mistake"), fakes.rows("ok"))


@pytest.mark.parametrize(
    ("why", "error", "said"),
    [
        (RuntimeEnvSetupError("pip found no such thing"), ResourceError, r"(?s)cluster\.fakes\.runtime_env.*no such"),
        (OutOfMemoryError("the node was short of memory"), StageError, "1 workers .*died as they started.*memory"),
    ],
)
def test_what_ray_cannot_start_is_an_error_of_ours(
    make: Any, monkeypatch: pytest.MonkeyPatch, why: Exception, error: type[Exception], said: str
) -> None:
    """Neither is an error of the actor, in Ray's terms."""

    def get(_: Any) -> None:
        raise why

    pool = make(max_restarts=0)
    monkeypatch.setattr("kka_ray.cluster.pool.ray.get", get)
    with pytest.raises(error, match=said):
        work(pool, fakes.rows("ok"))


def test_a_worker_that_ray_ended_for_lack_of_memory_is_replaced_at_once(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of such a worker raises it, as of one that died otherwise."""
    pool, get, started, ended = make(), ray.get, [], []
    make_actor = pool.make_actor

    def new(seat: Any) -> Any:
        started.append(make_actor(seat))
        return started[-1]

    def short_of_memory(reference: Any) -> Any:
        found = get(reference)
        if len(started) == 1 and pool._workers[0].loading is None:
            ended.append(reference)
            raise OutOfMemoryError("the node was short of memory")
        return found

    pool.make_actor = new
    monkeypatch.setattr("kka_ray.cluster.pool.ray.get", short_of_memory)
    assert work(pool, fakes.rows("ok")) == {0: {"0-ok": ""}}
    assert len(started) == 2
    assert len(ended) == 1


@pytest.mark.slow
def test_workers_that_die_as_they_start_end_the_run(make: Any) -> None:
    with pytest.raises(StageError, match="2 workers in succession died as they started"):
        work(make(start="crash", max_restarts=1), fakes.rows("ok"))


@pytest.mark.slow
def test_a_worker_that_does_not_fall_asleep_holds_nobody_up(make: Any) -> None:
    pool = make(start="sleepless", workers=2, chunk_timeout=3)
    assert work(pool, fakes.rows("ok")) == {0: {"0-ok": ""}}
    started = time.monotonic()
    pool.rest()
    assert time.monotonic() - started < 10
    assert work(pool, fakes.rows("ok")) == {0: {"0-ok": ""}}


def test_a_pool_grows_while_chunks_wait_and_shrinks_when_none_do(make: Any, tmp_path: Path) -> None:
    pool = make(tmp_path, most=2)
    for i in range(12):
        pool.submit(i, fakes.rows("slow"))
    sizes = set()
    for _ in drain([pool], poll=0.1):
        sizes.add(len(pool._workers))
    assert sizes == {1, 2}
    assert len(pool._workers) == 1


def test_a_pool_is_kept_at_work_while_another_is_waited_for(make: Any) -> None:
    scorers, renderers = make(), make()
    for i in range(12):
        renderers.submit(i, fakes.rows("ok"))
    scorers.submit(0, fakes.rows(*["slow"] * 10))
    renderers.submit(12, fakes.rows(*["slow"] * 30))
    found = list(drain([scorers, renderers], poll=0.1, until=[scorers]))
    assert [i for pool, i, _ in found if pool is scorers] == [0]
    assert [i for pool, i, _ in found if pool is renderers] == list(range(12))
    assert [i for _, i, _ in drain([renderers], poll=0.1)] == [12]


def test_a_worker_that_loads_anew_has_its_time_whatever_the_pool_waited_for_work(make: Any) -> None:
    pool = make()
    work(pool, fakes.rows("ok"))
    pool._idle_since -= 10 * pool.config.start_timeout  # a long training: nobody looked at the pool
    ray.kill(pool._workers[0].actor)
    assert work(pool, fakes.rows("ok", "ok")).keys() == {0}
