"""The pools of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from kka_ray import loop as loop_module
from kka_ray.cluster import streaming
from kka_ray.cluster.budget import BudgetError
from kka_ray.cluster.streaming import NORMALS_ROUND, Pools, Streamer, image_seed, sampler_libraries
from kka_ray.cluster.workers import RenderTask, SampleTask, line_ids
from kka_ray.config.models import LoopConfig, RunConfig
from kka_ray.data.base import ImageSet
from kka_ray.data.decode import encode_png
from kka_ray.describe import sampler as samplers
from kka_ray.errors import ConfigError
from kka_ray.features.base import Features
from kka_ray.features.cache import write_features
from kka_ray.loop import Loop, LoopResult
from kka_ray.prepare import bare
from kka_ray.records import Prompt, Rendering, to_table
from kka_ray.render import renderer
from kka_ray.store import Attempt, Store, stage_key


class _Pool:
    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.stopped = error, 0

    def stop(self) -> None:
        self.stopped += 1
        if self.error:
            raise self.error


def test_every_pool_is_stopped_even_if_another_cannot_be() -> None:
    pools = _Pool(ConnectionError("the cluster is gone")), _Pool()
    freed: list[bool] = []
    kept = SimpleNamespace(free=lambda: freed.append(True))
    with pytest.raises(ConnectionError, match="the cluster is gone"):
        Pools.close(SimpleNamespace(samplers=pools[0], renderers=pools[1], _dpo=kept))  # type: ignore[arg-type]
    assert [pool.stopped for pool in pools] == [1, 1]
    assert freed == [True]


@pytest.mark.parametrize(
    ("cluster", "rounds", "order"),
    [
        ({"samplers": {"gpus": 2}, "renderers": {"gpus": 1}}, 0, ["samplers", "renderers"]),
        ({"samplers": {"gpus": 1, "cpus": 4}, "renderers": {"gpus": 1}}, 0, ["samplers", "renderers"]),
        ({"samplers": {"cpus": 4}, "renderers": {"gpus": 0.5}}, 0, ["renderers", "samplers"]),
        ({}, 0, ["renderers", "samplers"]),
        ({"train_cpus": 2}, 1, ["DPO workers", "renderers", "samplers"]),
        ({"samplers": {"gpus": 2}, "train_gpus": 1}, 1, ["samplers", "DPO workers", "renderers"]),
        ({"samplers": {"cpus": 4}, "train_cpus": 2}, 1, ["samplers", "renderers"]),
        ({"mode": "colocated", "train_gpus": 1}, 1, []),
    ],
)
def test_the_larger_workers_get_their_places_first(
    cluster: dict[str, Any], rounds: int, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renderer of one GPU would start on the node with two, and a sampler of two would have none."""
    values = {"name": "x", "data": {"kind": "flowers"}, "loop": {"rounds": rounds}, "cluster": cluster}
    opened: list[str] = []
    monkeypatch.setattr(streaming.Pool, "open", lambda pool: opened.append(pool.name))
    monkeypatch.setattr(streaming.Kept, "open", lambda kept: kept._over or opened.append(kept.name))
    Pools(RunConfig.model_validate(values), "store").open()
    assert opened == order


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
            assert streamer.log_probs(["a"], ["b"]) == ([[-1.0]], {}, 0)
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


def test_evaluators_do_not_learn_from_the_photographs_that_are_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit of what an evaluator knows as normal lies nearer to it than one of any other normal photograph."""
    render = {"mode": "img2img", "pipeline": "builtin:flowers"}
    config = RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}, "render": render})
    streamer = Streamer.__new__(Streamer)
    streamer.config, streamer.renderer_identity = config, "r"
    shades = [np.full((4, 4, 3), shade, np.uint8) for shade in range(40)]
    streamer.prepared = SimpleNamespace(  # type: ignore[assignment]
        normals=SimpleNamespace(train=bare(shades)),
        backbone=SimpleNamespace(identity="b"),
        patches=False,
        train=Features(np.arange(40, dtype=np.float32)[:, None]),
        validation=Features(np.zeros((2, 1), np.float32)),
    )
    rows = [(f"r0-p000-s{k:03d}", "a cracked tile", "p000") for k in range(200)]
    edited = {int(image[0, 0, 0]) for image in streamer._render_task(rows, 0).normals or ()}
    assert len(edited) == 10

    loop = Loop.__new__(Loop)
    loop.config, loop.prepared = config, streamer.prepared
    learnt: list[float] = []

    def judged(ids: Any, rounds: Any, rows: Any, texts: Any, train: np.ndarray, *_: Any) -> None:
        learnt.extend(train[:, 0].tolist())

    monkeypatch.setattr(loop_module.judging, "judge", judged)
    monkeypatch.setattr(loop_module.judging, "write_result", lambda *_: None)
    monkeypatch.setattr(loop_module.judging, "read_result", lambda _: None)
    loop.store = cast(Any, SimpleNamespace(get_or_make=lambda stage, version, inputs, make: make(None)))
    loop._cross_fit(config.confusion, [], LoopResult([]), [])
    assert sorted({*learnt, *edited}) == list(range(40))
    assert not edited.intersection(learnt)


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

    def drained(pools: Any) -> Iterator[tuple[Any, int, Any]]:
        rows = [{"id": f"r0-p000-s{i:03d}", "prompt_id": "p000", "raw": f"line {i}", "error": ""} for i in range(4)]
        yield samplers, 0, commit("sample", 1, {}, pa.Table.from_pylist(rows))
        keys = []
        for task, status in zip(tasks, outcomes, strict=True):
            row = Rendering(task.rows[0][0], 0, 0, status, b"", "", "of one colour" if status == "failed" else "")
            keys.append(commit("render", renderer.VERSION, task.inputs, to_table(Rendering, [row])))
        yield renderers, 0, (keys[0], None)
        yield renderers, 2, (keys[2], None)

    samplers = SimpleNamespace(submit=lambda number, task: None)
    renderers = SimpleNamespace(submit=draw, stop=lambda: None)
    monkeypatch.setattr(streaming, "drain", drained)
    monkeypatch.setattr(streaming, "model_identity", lambda _: "m")
    monkeypatch.setattr(streaming, "pipeline_identity", lambda _: "r")
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


class _Played:
    """Pools that do their tasks in this process, those of the samplers and those of the renderers the last one first.

    A line says its id, and every third one is not to be drawn. An image of a line is of the shade of its number; the
    first image of a round does not show its text, and the second cannot be drawn.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.waiting: list[tuple[Any, int, Any]] = []
        self.tasks: list[Any] = []
        self.samplers, self.renderers = (SimpleNamespace(found=None) for _ in range(2))
        for pool in (self.samplers, self.renderers):
            pool.submit = lambda number, task, pool=pool: self.waiting.append((pool, number, task))

    def drain(self, pools: Sequence[Any]) -> Iterator[tuple[Any, int, Any]]:
        while self.waiting:
            pool, number, task = self.waiting.pop()
            self.tasks.append(task)
            inputs = {"ids": [row[0] for row in task.rows], "round": task.round}
            if pool is self.samplers:
                yield pool, number, self.store.get_or_make("sample", 1, inputs, lambda a: self._write(task, a)).key  # noqa: B023
                continue
            drawn = self.store.get_or_make("render", 1, inputs, lambda a: self._draw(task, a))  # noqa: B023
            numbers = [int(row["id"][-3:]) for row in drawn.table().to_pylist() if row["status"] == "ok"]
            features = self.store.get_or_make("features", 1, inputs, lambda a: self._extract(numbers, a))  # noqa: B023
            yield pool, number, (drawn.key, features.key if numbers else None)

    def _write(self, task: SampleTask, attempt: Attempt) -> None:
        lines = [(id_, id_[3:7]) for row, _, count in task.rows for id_ in line_ids(task.round, row, count)]
        rows = [{"id": id_, "prompt_id": p, "raw": f" line {id_}\n", "error": ""} for id_, p in lines]
        attempt.table(pa.Table.from_pylist(rows))

    def _draw(self, task: RenderTask, attempt: Attempt) -> None:
        rows = []
        for id_, _, seed in task.rows:
            number = int(id_[-3:])
            if task.round >= 0 and number == 1:
                rows.append(Rendering(id_, task.round, seed, "failed", b"", "", "no"))
                continue
            content = encode_png(np.full((4, 4, 3), number, np.uint8))
            rows.append(Rendering(id_, task.round, seed, "ok", content, "", match=0.0 if number == 0 else 0.9))
        attempt.table(to_table(Rendering, rows))

    def _extract(self, numbers: list[int], attempt: Attempt) -> None:
        pooled = np.array(numbers, np.float32)[:, None]
        write_features(attempt, Features(pooled, pixels=np.zeros((len(pooled), 32, 32, 3), np.uint8)))


class _Guard:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def judge(self, lines: Sequence[str]) -> list[tuple[str, str]]:
        self.heard += lines
        return [(x.strip(), "duplicate" if int(x.strip()[-1]) % 3 == 2 else "") for x in lines]


@pytest.fixture
def streamer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Streamer:
    streamer = Streamer.__new__(Streamer)
    streamer.config = RunConfig.model_validate(
        {
            "name": "x",
            "data": {"kind": "flowers"},
            "describe": {"chunk": 5},
            "render": {"chunk": 3, "normals": 6, "match": {"least": 0.5}},
            "loop": {"lines": 11},
            "cluster": {"max_failed_share": 0.5},
        }
    )
    streamer.store = Store(str(tmp_path))
    played = _Played(streamer.store)
    monkeypatch.setattr(streaming, "drain", played.drain)
    streamer._samplers, streamer._renderers, streamer._turns = played.samplers, played.renderers, False  # type: ignore[assignment]
    streamer._pools = SimpleNamespace(open=lambda: None)  # type: ignore[assignment]
    streamer._later, streamer._early, streamer._unread, streamer.normals = [], [], {}, streaming.Drawn()
    streamer.guard = _Guard()  # type: ignore[assignment]
    streamer.sampler_identity, streamer.renderer_identity, streamer._sampler_versions = "s", "r", {}
    captions = tuple(f"normal {i}" for i in range(40))
    blank = tuple(np.zeros((4, 4, 3), np.uint8) for _ in captions)
    streamer.prepared = SimpleNamespace(  # type: ignore[assignment]
        normals=SimpleNamespace(train=ImageSet(captions, blank, captions, captions, np.zeros(40, bool))),
        backbone=SimpleNamespace(identity="b"),
        patches=False,
    )
    streamer.played = played  # type: ignore[attr-defined]
    return streamer


def _round(streamer: Streamer, number: int, seed: int) -> tuple[list[Any], streaming.Drawn, list[Any]]:
    """Lines, images and tasks of a round of three prompts."""
    streamer.played.tasks.clear()  # type: ignore[attr-defined]
    prompts = [Prompt(f"p{i:03d}", f"list {i}", ()) for i in range(3)]
    found = streamer.run(prompts, number, seed, None, lambda *_: None, lambda raw: None)
    return *found, list(streamer.played.tasks)  # type: ignore[attr-defined]


def test_a_round_is_in_the_order_of_its_lines_whatever_came_first(streamer: Streamer) -> None:
    descriptions, drawn, tasks = _round(streamer, 1, 1000)
    ids = [d.id for d in descriptions]
    assert ids == [f"r1-p{p:03d}-s{s:03d}" for p, count in ((0, 4), (1, 4), (2, 3)) for s in range(count)]
    assert [raw.strip()[5:] for raw in streamer.guard.heard] == ids  # type: ignore[attr-defined]
    assert all(d.raw.strip() == f"line {d.id}" and d.prompt_id == d.id[3:7] for d in descriptions)
    wanted = [d.id for d in descriptions if d.status == "ok"]
    assert [d.id[-3:] for d in descriptions if d.status != "ok"] == ["002"] * 3
    assert [r.id for r in drawn.renderings] == wanted
    assert drawn.ids == [id_ for id_ in wanted if not id_.endswith("001")]
    numbers = [int(id_[-3:]) for id_ in drawn.ids]
    assert [int(image[0, 0, 0]) for image in drawn.images(drawn.ids)] == numbers
    assert drawn.features.pooled[:, 0].tolist() == numbers
    assert drawn.mismatched == {id_ for id_ in wanted if id_.endswith("000")}
    assert max(len(t.rows) for t in tasks if isinstance(t, RenderTask)) == 3
    assert max(sum(n for *_, n in t.rows) for t in tasks if isinstance(t, SampleTask)) <= 5


def test_more_lines_of_a_prompt_than_a_chunk_are_several_chunks(streamer: Streamer) -> None:
    streamer.config = streamer.config.model_copy(update={"loop": LoopConfig(lines=36)})
    descriptions, _, tasks = _round(streamer, 1, 1000)
    assert [d.id for d in descriptions] == [f"r1-p{p:03d}-s{s:03d}" for p in range(3) for s in range(12)]
    assert {d.prompt_id for d in descriptions} == {"p000", "p001", "p002"}
    written = [t for t in tasks if isinstance(t, SampleTask)]
    assert len(written) == len({t.seed for t in written}) == 9
    assert max(sum(n for *_, n in t.rows) for t in written) <= 5


def test_every_chunk_and_every_image_draws_random_numbers_of_its_own(streamer: Streamer) -> None:
    tasks = _round(streamer, 0, 0)[2] + _round(streamer, 1, 1)[2]
    chunks = [t.seed for t in tasks if isinstance(t, SampleTask)]
    images = [seed for t in tasks if isinstance(t, RenderTask) for *_, seed in t.rows]
    for seeds in (chunks, images):
        assert len(seeds) == len(set(seeds)) > 5
    assert all(0 <= seed < 2**31 for seed in images)
    assert image_seed(0, "r0-p000-s000") != image_seed(1, "r0-p000-s000"), "another run draws other images"


def test_both_pools_are_opened_before_either_is_given_anything(
    streamer: Streamer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop whose pools were not opened before, as a trial's, begins with the renderers."""
    done: list[str] = []
    monkeypatch.setattr(streamer._pools, "open", lambda: done.append("open"))
    monkeypatch.setattr(streamer, "_draw", lambda number, task: done.append("draw"))
    streamer.submit_normals()
    assert done == ["open", "draw", "draw"]


def test_the_normal_captions_that_are_drawn_are_a_random_part_of_them(streamer: Streamer) -> None:
    streamer.submit_normals()
    _, drawn, tasks = _round(streamer, 0, 0)
    shown = [text for t in tasks if t.round == NORMALS_ROUND for _, text, _ in t.rows]
    captions = streamer.prepared.normals.train.captions
    assert len(set(shown)) == 6
    assert set(shown) <= set(captions)
    assert set(shown) != set(captions[:6])
    assert streamer.normals.ids == [f"n{i:04d}" for i in range(6)]
    assert not set(streamer.normals.ids) & set(drawn.ids)
