"""Rows at fault have an output of their own, and a run without the fault makes the undisturbed one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from kka_ray.cluster.workers import SAMPLE_VERSION, RenderTask, RenderWorker, SamplerWorker, SampleTask
from kka_ray.config.models import BackboneConfig, DescribeConfig, RenderConfig
from kka_ray.store import Attempt, Store, stage_key

ROWS = (("p000", "one", 1), ("p001", "two", 1))


class _Engine:
    def sample(self, prompts: Sequence[str], count: int, seed: int) -> list[list[str]]:
        return [[f" {prompt}\n"] * count for prompt in prompts]

    def take_usage(self) -> dict[str, int]:
        return {}


def test_lines_at_fault_are_written_by_a_later_run(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    worker = SamplerWorker(store.uri, DescribeConfig(), 1, "cpu")
    worker.engine = _Engine()  # type: ignore[assignment]
    task = SampleTask(rows=ROWS, round=0, seed=0, adapter=None, inputs={"x": 1})

    def written(task: SampleTask) -> list[tuple[str, str]]:
        found = store.find("sample", str(worker.work(task)))
        assert found is not None
        return [(row["raw"], row["error"]) for row in found.table().to_pylist()]

    assert written(replace(task, failed={"p000": "a crash"})) == [("", "a crash"), (" two\n", "")]
    assert written(replace(task, failed={"p000": "too slow"})) == [("", "too slow"), (" two\n", "")]
    assert written(task) == [(" one\n", ""), (" two\n", "")]
    assert store.find("sample", stage_key("sample", SAMPLE_VERSION, {"x": 1})) is not None


def test_images_at_fault_are_drawn_by_a_later_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(self: RenderWorker, task: RenderTask, attempt: Attempt) -> None:
        attempt.table(pa.table({"error": [task.failed.get(row[0], "") for row in task.rows]}))

    monkeypatch.setattr(RenderWorker, "_make", make)
    store = Store(str(tmp_path))
    worker = RenderWorker(store.uri, RenderConfig(), BackboneConfig(), False, 1, "cpu")
    task = RenderTask(rows=ROWS, round=0, normals=None, inputs={"x": 1})

    def drawn(task: RenderTask) -> list[str]:
        return list(store.reported("render", worker.work(task)).table()["error"].to_pylist())

    assert drawn(replace(task, failed={"p001": "a crash"})) == ["", "a crash"]
    assert drawn(task) == ["", ""]
