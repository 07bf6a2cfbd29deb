"""The workers with the real small models, in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kka_ray.cluster.workers import RenderTask, RenderWorker, SamplerWorker, SampleTask, ScoreTask
from kka_ray.config.models import BackboneConfig, DescribeConfig, RenderConfig
from kka_ray.errors import StageError
from kka_ray.features.cache import read_features
from kka_ray.records import Rendering, from_table
from kka_ray.store import Store
from tests.integration.tiny_run import models_are_missing

pytestmark = pytest.mark.skipif(models_are_missing(), reason="the built-in models are missing: run `kka setup`")
PROMPTS = (("p000", "Flowers:\n- a red rose\n-", 2), ("p001", "Flowers:\n- a blue iris\n-", 2))


def test_prompts_at_fault_are_rows_and_numbers_that_are_not_finite_raise(tmp_path: Path) -> None:
    worker = SamplerWorker(str(tmp_path), DescribeConfig(max_tokens=8), 1, "cpu")
    worker.load()
    inputs = {"model": worker.model}
    task = SampleTask(rows=PROMPTS, round=1, seed=3, adapter=None, inputs=inputs, failed={"p000": "a crash"})
    key = worker.work(task)
    found = Store(str(tmp_path)).find("sample", str(key))
    assert found is not None
    rows = found.table().to_pylist()
    assert [(r["id"], r["error"]) for r in rows] == [
        ("r1-p000-s000", "a crash"),
        ("r1-p000-s001", "a crash"),
        ("r1-p001-s000", ""),
        ("r1-p001-s001", ""),
    ]
    assert [bool(r["raw"]) for r in rows] == [False, False, True, True]

    score = ScoreTask(rows=(("a", PROMPTS[0][1], " a rose\n"), ("b", PROMPTS[1][1], " a tulip\n")))
    (whole, _), (part, _) = worker.work(score), worker.work(replace(score, failed={"a": "a crash"}))
    assert len(whole[0]) > 1
    assert part[0] == []
    assert np.allclose(part[1], whole[1], atol=0.05)

    before = sorted(tmp_path.rglob("*"))
    worker.probe(task)
    assert sorted(tmp_path.rglob("*")) == before, "a probe keeps nothing"
    weight = next(worker.engine.model.parameters())  # type: ignore[attr-defined]
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        worker.work(replace(task, failed={}, inputs=inputs | {"x": 2}))
    marker = json.loads((tmp_path / "sample" / str(key) / "committed.json").read_text())
    assert marker["inputs"] == {**inputs, "failed": {"p000": "a crash"}}
    with pytest.raises(StageError, match="another version of the sampler's model"):
        worker.work(replace(task, inputs={"model": "another"}))


def test_descriptions_at_fault_are_rows_without_touching_the_others(tmp_path: Path) -> None:
    worker = RenderWorker(str(tmp_path), RenderConfig(steps=2), BackboneConfig(image_size=64), False, 1, "cpu")
    worker.load()
    texts = ["a red flower", "a blue flower", "a star"]
    rows = tuple((f"r0-p000-s{i:03d}", text, i) for i, text in enumerate(texts))
    failed = {rows[1][0]: "not done within 9 s"}
    of_features = {"backbone": worker.backbone.identity}
    inputs = {"model": worker.model}
    task = RenderTask(rows=rows, round=0, normals=None, inputs=inputs, features=of_features, failed=failed)
    key, key_of_features = worker.work(task)
    assert key_of_features is not None
    store = Store(str(tmp_path))
    found = store.reported("render", key)
    records = from_table(Rendering, found.table())
    assert [(r.id, r.status, r.error) for r in records] == [
        (rows[0][0], "ok", ""),
        (rows[1][0], "failed", "not done within 9 s"),
        (rows[2][0], "ok", ""),
    ]
    assert len(read_features(store.reported("features", key_of_features), patches=False)) == 2

    other, other_features = worker.work(replace(task, features=of_features | {"patches": True}))
    assert other == key, "other features are extracted from the images that are there"
    assert other_features not in (None, key_of_features)
    unseen = {row[0]: "a crash" for row in rows}
    assert worker.work(replace(task, failed=unseen))[1] is None, "nothing was drawn"
    assert task.part(1, 3).rows == rows[1:]
