"""Rows at fault are rows of an output of its own, and a run without the fault makes the undisturbed one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kka_ray.cluster.pool import Pool, drain
from kka_ray.cluster.workers import SAMPLE_VERSION, RenderTask, RenderWorker, SamplerWorker, SampleTask, start
from kka_ray.config.models import ApiSampler, BackboneConfig, ClusterConfig, DescribeConfig, PoolConfig, RenderConfig
from kka_ray.describe.sampler import model_identity
from kka_ray.errors import StageError
from kka_ray.records import Rendering, to_table
from kka_ray.store import Attempt, Store, stage_key
from tests.describe.completions_server import completions_server

ROWS = (("p000", "one", 1), ("p001", "two", 1))


class _Engine:
    def sample(self, prompts: Sequence[str], count: int, seed: int) -> list[list[str]]:
        return [[f" {prompt}\n"] * count for prompt in prompts]

    def take_usage(self) -> dict[str, int]:
        return {}


def test_lines_at_fault_are_written_by_a_later_run(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    worker = SamplerWorker(store.uri, DescribeConfig(), 1, "cpu")
    worker.engine, worker.model = _Engine(), "m"  # type: ignore[assignment]
    task = SampleTask(rows=ROWS, round=0, seed=0, adapter=None, inputs={"model": "m"})

    def written(task: SampleTask) -> list[tuple[str, str]]:
        found = store.find("sample", str(worker.work(task)))
        assert found is not None
        return [(row["raw"], row["error"]) for row in found.table().to_pylist()]

    assert written(replace(task, failed={"p000": "a crash"})) == [("", "a crash"), (" two\n", "")]
    assert written(replace(task, failed={"p000": "too slow"})) == [("", "too slow"), (" two\n", "")]
    assert written(task) == [(" one\n", ""), (" two\n", "")]
    assert store.find("sample", stage_key("sample", SAMPLE_VERSION, {"model": "m"})) is not None


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_prompt_that_an_api_refuses_is_a_failed_row(tmp_path: Path) -> None:
    store, rows = Store(str(tmp_path)), tuple((f"p{i}", f"prompt-{i}", 1) for i in range(4))
    with completions_server() as service:
        service.refused = {"prompt-2": 403}
        sampler = ApiSampler(kind="api", base_url=service.url, model="m", requests_per_minute=1e6)
        task = SampleTask(rows=rows, round=0, seed=0, adapter=None, inputs={"model": model_identity(sampler)})
        arguments = (store.uri, DescribeConfig(sampler=sampler))
        size = PoolConfig(cpus=0.1)
        pool = Pool("api", lambda seat: start(SamplerWorker, size, "cpu", seat, *arguments), size, ClusterConfig())
        pool.submit(0, task)
        try:
            ((_, _, key),) = drain([pool], poll=0.1)
        finally:
            pool.stop()
    found = store.reported("sample", key).table().to_pylist()
    assert [row["raw"] for row in found] == [" prompt-0 0\n", " prompt-1 0\n", "", " prompt-3 0\n"]
    assert [bool(row["error"]) for row in found] == [False, False, True, False]
    assert "HTTP 403" in found[2]["error"]


def test_images_at_fault_are_drawn_by_a_later_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(self: RenderWorker, task: RenderTask, attempt: Attempt) -> None:
        rows = [(row[0], task.failed.get(row[0], "")) for row in task.rows]
        attempt.table(to_table(Rendering, [Rendering(id_, 0, 0, "failed", b"", "", error) for id_, error in rows]))

    monkeypatch.setattr(RenderWorker, "_make", make)
    store = Store(str(tmp_path))
    worker = RenderWorker(store.uri, RenderConfig(), BackboneConfig(), False, 1, "cpu")
    worker.model, worker.backbone = "r", SimpleNamespace(identity="b")  # type: ignore[assignment]
    task = RenderTask(rows=ROWS, round=0, normals=None, inputs={"model": "r"}, features={"backbone": "b"})

    def drawn(task: RenderTask) -> list[str]:
        return list(store.reported("render", worker.work(task)[0]).table()["error"].to_pylist())

    assert drawn(replace(task, failed={"p001": "a crash"})) == ["", "a crash"]
    assert drawn(task) == ["", ""]
    for others in (replace(task, inputs={"model": "another"}), replace(task, features={"backbone": "another"})):
        with pytest.raises(StageError, match=r"another version of the (renderer|backbone)"):
            worker.work(others)
