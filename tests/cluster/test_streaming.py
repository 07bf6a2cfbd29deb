"""The pools of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kka_ray.cluster import streaming
from kka_ray.cluster.budget import BudgetError
from kka_ray.cluster.streaming import Pools, Streamer, sampler_libraries
from kka_ray.cluster.workers import RenderTask
from kka_ray.config.models import RunConfig
from kka_ray.data.base import ImageSet
from kka_ray.describe import sampler as samplers
from kka_ray.errors import ConfigError
from kka_ray.records import Prompt, Rendering, to_table
from kka_ray.render import renderer
from kka_ray.store import Store, stage_key


class _Pool:
    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.stopped = error, 0

    def stop(self) -> None:
        self.stopped += 1
        if self.error:
            raise self.error


def test_every_pool_is_stopped_even_if_another_cannot_be() -> None:
    pools = _Pool(ConnectionError("the cluster is gone")), _Pool()
    with pytest.raises(ConnectionError, match="the cluster is gone"):
        Pools.close(SimpleNamespace(samplers=pools[0], renderers=pools[1]))  # type: ignore[arg-type]
    assert [pool.stopped for pool in pools] == [1, 1]


def test_an_engine_that_ray_installs_for_the_samplers_need_not_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise samplers.PackageNotFoundError(name)

    monkeypatch.setattr(samplers, "version", missing)
    values = {"name": "x", "data": {"kind": "flowers"}, "describe": {"sampler": {"kind": "vllm"}}}
    with pytest.raises(ConfigError, match="not installed here"):
        sampler_libraries(RunConfig.model_validate(values))
    values["cluster"] = {"samplers": {"gpus": 1, "runtime_env": {"pip": ["vllm==0.32.0"]}}}
    assert sampler_libraries(RunConfig.model_validate(values)) == {"pip": ["vllm==0.32.0"]}


def test_images_drawn_while_lines_are_scored_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    samplers, renderers = object(), object()

    def drained(pools: Any, until: Any = None) -> Iterator[tuple[Any, int, str]]:
        if until:
            yield renderers, 0, "an image"
            yield samplers, 0, ([[-1.0]], {})
            return
        yield samplers, 0, "lines"
        yield renderers, 1, "another image"

    monkeypatch.setattr(streaming, "drain", drained)
    pool = SimpleNamespace(submit=lambda number, task: None)
    streamer = Streamer.__new__(Streamer)
    streamer.config = RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}})
    streamer._samplers, streamer._renderers, streamer._turns, streamer._early = pool, renderers, False, []  # type: ignore[assignment]
    samplers = pool
    taken = []
    for pool_, _, found in streamer._turn_by_turn(lambda: None):
        taken.append(found)
        if pool_ is samplers:
            assert streamer.log_probs(["a"], ["b"]) == ([[-1.0]], {})
    assert taken == ["lines", "an image", "another image"]


def test_edits_of_other_photographs_under_the_same_names_are_made_anew() -> None:
    config = RunConfig.model_validate(
        {"name": "x", "data": {"kind": "flowers"}, "render": {"mode": "img2img", "pipeline": "builtin:flowers"}}
    )

    def inputs(shade: int) -> dict[str, Any]:
        streamer = Streamer.__new__(Streamer)
        streamer.config, streamer.renderer_identity = config, "r"
        train = ImageSet(("000.png",), (np.full((4, 4, 3), shade, np.uint8),), ("",), ("",), np.zeros(1, bool))
        streamer.prepared = SimpleNamespace(  # type: ignore[assignment]
            normals=SimpleNamespace(train=train), backbone=SimpleNamespace(identity="b"), patches=False
        )
        return streamer._render_task([("r0-p000-s000", "a cracked tile", "p000")], 0).inputs

    assert inputs(1) == inputs(1)
    assert inputs(1)["normals"] != inputs(2)["normals"]


def test_images_that_failed_are_tried_again_after_the_budget_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of chunks that are in the store and were not read yet as well."""
    config = RunConfig.model_validate(
        {
            "name": "x",
            "data": {"kind": "flowers"},
            "loop": {"lines": 4},
            "render": {"chunk": 1, "normals": 0, "pipeline": "builtin:flowers"},
            "detect": {"controls": []},
            "cluster": {"max_failed_share": 0.25},
        }
    )
    store, tasks = Store(str(tmp_path)), list[RenderTask]()
    outcomes = ("failed", "ok", "failed", "failed")

    def commit(stage: str, version: int, inputs: dict[str, Any], table: pa.Table) -> str:
        return store.get_or_make(stage, version, inputs, lambda attempt: attempt.table(table)).key

    def draw(number: int, task: RenderTask) -> None:
        tasks.append(task)

    def drained(pools: Any) -> Iterator[tuple[Any, int, str]]:
        rows = [{"id": f"r0-p000-s{i:03d}", "prompt_id": "p000", "raw": f"line {i}", "error": ""} for i in range(4)]
        yield samplers, 0, commit("sample", 1, {}, pa.Table.from_pylist(rows))
        keys = []
        for task, status in zip(tasks, outcomes, strict=True):
            row = Rendering(task.rows[0][0], 0, 0, status, b"", "", "of one colour" if status == "failed" else "")
            keys.append(commit("render", renderer.VERSION, task.inputs, to_table(Rendering, [row])))
        yield renderers, 0, keys[0]
        yield renderers, 2, keys[2]

    samplers = SimpleNamespace(submit=lambda number, task: None)
    renderers = SimpleNamespace(submit=draw, stop=lambda: None)
    monkeypatch.setattr(streaming, "drain", drained)
    monkeypatch.setattr(streaming, "read_features", lambda *_, **__: None)
    monkeypatch.setattr(streaming, "model_identity", lambda _: "m")
    monkeypatch.setattr(streaming.assets, "resolve", lambda _: SimpleNamespace(identity="r"))
    prepared = SimpleNamespace(
        backbone=SimpleNamespace(identity="b"), patches=False, train=SimpleNamespace(take=lambda _: None)
    )
    guard = SimpleNamespace(judge=lambda lines: [(line, "") for line in lines])
    pools: Any = SimpleNamespace(samplers=samplers, renderers=renderers, turns=False)
    streamer = Streamer(config, store, prepared, guard, pools)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="2 of 4 rows failed"):
        streamer.run([Prompt("p000", "a prompt", ())], 0, 0, None, lambda *_: None, lambda _: None)
    there = [store.has("render", stage_key("render", renderer.VERSION, task.inputs)) for task in tasks]
    assert there == [status == "ok" for status in outcomes]
