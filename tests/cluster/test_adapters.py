"""Which policy and which random numbers a sampler takes for a task, what it counts, and half an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kka_ray.cluster.workers import SamplerWorker, SampleTask, ScoreTask
from kka_ray.config.models import DescribeConfig
from kka_ray.store import Store


class _Engine:
    """Fails at the first adapter that it is given where it is told so; remembers all."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.given: list[Path | None] = []
        self.seeds: list[int] = []

    def load_adapter(self, folder: Path | None) -> None:
        self.given.append(folder)
        if self.fails and len(self.given) == 1:
            raise MemoryError("no room")

    def sample(self, prompts: Sequence[str], count: int, seed: int) -> list[list[str]]:
        self.seeds.append(seed)
        return [["a line\n"] * count for _ in prompts]

    def log_probs(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[float]]:
        return [[-1.0] for _ in prompts]

    def take_usage(self) -> dict[str, int]:
        return {}


@pytest.fixture
def worker(tmp_path: Path) -> SamplerWorker:
    worker = SamplerWorker(str(tmp_path), DescribeConfig(), 1, "cpu")
    worker.engine, worker.model = _Engine(), "m"  # type: ignore[assignment]
    return worker


def test_each_task_has_the_policy_that_it_names(worker: SamplerWorker) -> None:
    key = worker.store.get_or_make("dpo", 1, {}, lambda a: a.write("adapter/adapter_config.json", b"{}")).key
    write = SampleTask(rows=(("p000", "a list", 1),), round=1, seed=0, adapter=key, inputs={"model": "m"})
    worker.work(write)
    worker.work(ScoreTask(rows=(("l0", "a list", " a line\n"),)))
    worker.work(replace(write, inputs={"model": "m", "again": 1}))
    trained = worker.store.reported("dpo", key).local / "adapter"
    assert worker.engine.given == [trained, None, trained]  # type: ignore[attr-defined]


def test_prompts_with_other_numbers_of_lines_draw_other_random_numbers(worker: SamplerWorker) -> None:
    rows = (("p000", "a", 3), ("p001", "b", 2), ("p002", "c", 3))
    worker.work(SampleTask(rows=rows, round=0, seed=5, adapter=None, inputs={"model": "m"}))
    worker.work(SampleTask(rows=rows, round=0, seed=6, adapter=None, inputs={"model": "m", "another": 1}))
    seeds = worker.engine.seeds  # type: ignore[attr-defined]
    assert len(seeds) == len(set(seeds)) == 4


class _Service(_Engine):
    """Counts what it is asked, and refuses one prompt after it answered the others."""

    requests = 0

    def sample(self, prompts: Sequence[str], count: int, seed: int) -> list[list[str]]:
        self.requests += len(prompts)
        if "refused" in prompts:
            raise ValueError("the service will not have it")
        return super().sample(prompts, count, seed)

    def take_usage(self) -> dict[str, int]:
        taken, self.requests = self.requests, 0
        return {"requests": taken} if taken else {}


def test_what_was_asked_for_answers_that_are_lost_does_not_count(worker: SamplerWorker) -> None:
    worker.engine = _Service()  # type: ignore[assignment]
    task = SampleTask(
        rows=(("p000", "a", 1), ("p001", "refused", 1)), round=0, seed=5, adapter=None, inputs={"model": "m"}
    )
    with pytest.raises(ValueError, match="will not have it"):
        worker.work(task)
    worker.probe(task.part(0, 1))
    key = worker.work(replace(task, failed={"p001": "refused"}))
    assert worker.store.reported("sample", str(key)).json("usage") == {"requests": 1}


def test_after_half_an_adapter_the_base_model_is_loaded_anew(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    key = store.get_or_make("dpo", 1, {}, lambda a: a.write("adapter/adapter_config.json", b"{}")).key
    worker = SamplerWorker(store.uri, DescribeConfig(), 1, "cpu")
    engine = _Engine(fails=True)
    worker.engine = engine  # type: ignore[assignment]
    worker._use(None)
    assert engine.given == [], "the base model is there from the start"
    with pytest.raises(MemoryError):
        worker._use(key)
    worker._use(None)
    assert engine.given[1] is None
    assert worker.adapter is None
