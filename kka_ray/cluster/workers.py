"""The actors: a sampler and a renderer that stay loaded across rounds and commit their chunks to the store themselves.

A chunk that is committed is never made again: a worker that is started anew, or a run that is resumed, finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from kka_ray.cluster.leases import open_store
from kka_ray.config.models import BackboneConfig, DescribeConfig, PoolConfig, RenderConfig
from kka_ray.records import Rendering, to_table
from kka_ray.store import Attempt, Store

SAMPLE_VERSION = 1


@dataclass(frozen=True)
class SampleTask:
    """Lines to be written: for each prompt its id, its text and how many; all with one seed and one adapter."""

    prompts: tuple[tuple[str, str, int], ...]
    round: int
    seed: int
    adapter: str | None
    """Key of the adapter's output in stage `dpo`, or None for the base model."""
    inputs: dict[str, Any]
    """What the key of the chunk's output is made of."""


@dataclass(frozen=True)
class RenderTask:
    """Descriptions to be drawn: (id, text, seed) each, with the normal image to edit where the mode asks for one."""

    rows: tuple[tuple[str, str, int], ...]
    round: int
    normals: tuple[Any, ...] | None
    inputs: dict[str, Any]


class SamplerWorker:
    """Writes lines. Its result is the key of an output of stage `sample`: a table with id, prompt_id and raw."""

    def __init__(self, store: str, config: DescribeConfig, threads: int, device: str) -> None:
        import torch

        from kka_ray.describe.sampler import build_sampler

        torch.set_num_threads(threads)
        self.store = open_store(store)
        self.engine = build_sampler(config, device)
        self.adapter: str | None = None

    def work(self, task: SampleTask) -> str:
        """Makes a chunk, unless it is in the store."""
        return self.store.get_or_make("sample", SAMPLE_VERSION, task.inputs, lambda a: self._make(task, a)).key

    def log_probs(self, prompts: list[str], completions: list[str], adapter: str | None) -> list[list[float]]:
        """Token log-probabilities of completions under an adapter's policy, or the base model's."""
        self._use(adapter)
        return self.engine.log_probs(prompts, completions)

    def _use(self, adapter: str | None) -> None:
        if adapter == self.adapter:
            return
        self.engine.load_adapter(_adapter_folder(self.store, adapter))
        self.adapter = adapter

    def _make(self, task: SampleTask, attempt: Attempt) -> None:
        self._use(task.adapter)
        rows = []
        for count in sorted({n for _, _, n in task.prompts}):
            group = [(id_, text) for id_, text, n in task.prompts if n == count]
            written = self.engine.sample([text for _, text in group], count, task.seed)
            for (prompt_id, _), lines in zip(group, written, strict=True):
                for k, raw in enumerate(lines):
                    id_ = f"r{task.round}-{prompt_id}-s{k:03d}"
                    rows.append({"id": id_, "prompt_id": prompt_id, "raw": raw})
        names = ("id", "prompt_id", "raw")
        attempt.table(pa.Table.from_pylist(rows, schema=pa.schema([(n, pa.string()) for n in names])))


class RenderWorker:
    """Draws descriptions and extracts the features of what it drew.

    Its result is the key of an output of stage `render`: a table of `Rendering` and the features of those drawn.
    """

    def __init__(
        self, store: str, config: RenderConfig, backbone: BackboneConfig, patches: bool, threads: int, device: str
    ) -> None:
        from kka_ray.features.backbone import Backbone
        from kka_ray.render.renderer import Renderer

        self.store = open_store(store)
        self.patches = patches
        self.renderer = Renderer.load(config, device, threads)
        self.backbone = Backbone.load(backbone, device)

    def work(self, task: RenderTask) -> str:
        """Makes a chunk, unless it is in the store."""
        from kka_ray.render.renderer import VERSION

        return self.store.get_or_make("render", VERSION, task.inputs, lambda a: self._make(task, a)).key

    def _make(self, task: RenderTask, attempt: Attempt) -> None:
        import hashlib

        import numpy as np

        from kka_ray.data.decode import encode_png
        from kka_ray.features.cache import write_features

        texts, seeds = [text for _, text, _ in task.rows], [seed for _, _, seed in task.rows]
        drawn = self.renderer.draw(texts, seeds, task.normals)
        records = []
        for (id_, _, seed), image in zip(task.rows, drawn, strict=True):
            if isinstance(image, np.ndarray):
                png = encode_png(image)
                digest = hashlib.sha256(png).hexdigest()
                records.append(Rendering(id_, task.round, seed, "ok", png, digest))
            else:
                records.append(Rendering(id_, task.round, seed, "failed", b"", "", image.reason))
        attempt.table(to_table(Rendering, records))
        images = [image for image in drawn if isinstance(image, np.ndarray)]
        if images:
            write_features(attempt, self.backbone.extract(images, self.patches))


def _adapter_folder(store: Store, key: str | None) -> Path | None:
    if key is None:
        return None
    output = store.find("dpo", key)
    if output is None:
        raise FileNotFoundError(f"adapter dpo/{key} is not in the store {store.uri}")
    return output.local / "adapter"


def start(cls: type, pool: PoolConfig, max_restarts: int, *arguments: Any) -> Any:
    """An actor of `cls` with a pool's resources, started again up to `max_restarts` times if it dies."""
    device = "cuda" if pool.gpus else "cpu"
    options = {
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
        "max_restarts": max_restarts,
        "max_task_retries": max_restarts,
    }
    return ray.remote(**options)(cls).remote(*arguments, pool.threads, device)
