"""The pools of a run."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kka_ray.cluster import streaming
from kka_ray.cluster.streaming import Pools, Streamer, sampler_libraries
from kka_ray.config.models import RunConfig
from kka_ray.data.base import ImageSet
from kka_ray.describe import sampler as samplers
from kka_ray.errors import ConfigError


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
