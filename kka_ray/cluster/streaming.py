"""One round of describing and rendering, streamed: descriptions are drawn while others are still being written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import ray

from kka_ray import assets, versions
from kka_ray.cluster.pool import Pool, drain
from kka_ray.cluster.workers import RenderTask, RenderWorker, SamplerWorker, SampleTask, start
from kka_ray.config.models import RunConfig
from kka_ray.data.decode import decode
from kka_ray.describe.guard import Guard
from kka_ray.features.base import Features
from kka_ray.features.cache import read_features
from kka_ray.prepare import Prepared, feature_inputs
from kka_ray.records import Description, Prompt, Rendering, from_table
from kka_ray.store import Store

NORMALS_ROUND = -1
"""What `Rendering.round` says of drawn normal captions, which belong to no round."""


class _Progress(Protocol):
    def __call__(self, stage: str, round: int, done: int, total: int) -> None: ...


@dataclass
class Drawn:
    """What a round drew. `ids`, `images` and `features` hold those drawn without error, in the order of the lines."""

    renderings: list[Rendering] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    features: Features = field(default_factory=lambda: Features(np.zeros((0, 0), np.float32)))
    raw: list[tuple[str, str]] = field(default_factory=list)
    """(prompt id, raw line) of every line written."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds that workers spent on the round's chunks, by stage, whenever that was."""


class Streamer:
    """The pools of samplers and renderers, and the guard between them."""

    def __init__(self, config: RunConfig, store: Store, prepared: Prepared, guard: Guard) -> None:
        self.config, self.store, self.prepared, self.guard = config, store, prepared, guard
        cluster = config.cluster
        self.normals = Drawn()
        """The normal captions that were drawn, once a round has run after `submit_normals`."""
        self._normal_keys: dict[int, str] = {}
        self.sampler_identity = assets.resolve(config.describe.sampler.model).identity
        self.renderer_identity = assets.resolve(config.render.pipeline).identity
        self._samplers = Pool(
            "samplers",
            lambda: start(SamplerWorker, cluster.samplers, cluster.max_restarts, store.uri, config.describe),
            cluster.samplers.workers,
            cluster.in_flight,
            cluster.chunk_timeout,
        )
        self._renderers = Pool(
            "renderers",
            lambda: start(
                RenderWorker,
                cluster.renderers,
                cluster.max_restarts,
                store.uri,
                config.render,
                config.backbone,
                prepared.patches,
            ),
            cluster.renderers.workers,
            cluster.in_flight,
            cluster.chunk_timeout,
        )

    def close(self) -> None:
        """Ends the actors of both pools."""
        self._samplers.stop()
        self._renderers.stop()

    def log_probs(self, prompts: list[str], completions: list[str]) -> list[list[float]]:
        """Token log-probabilities under the untuned model, shared out among the samplers."""
        workers, size = self._samplers.actors, self.config.describe.chunk
        # Parts of a fixed size: what is computed together must not depend on the number of workers.
        parts = [
            workers[k % len(workers)].log_probs.remote(prompts[i : i + size], completions[i : i + size], None)
            for k, i in enumerate(range(0, len(prompts), size))
        ]
        return [row for part in ray.get(parts) for row in part]

    def submit_normals(self) -> None:
        """Hands captions of training normals to the renderers; `run` collects them with its round's images."""
        train, config = self.prepared.normals.train, self.config
        order = np.random.default_rng(config.seed).permutation(len(train))
        rows = [(f"n{k:04d}", train.captions[i], "") for k, i in enumerate(order[: config.render.normals])]
        for k, task in enumerate(self._render_tasks(rows, NORMALS_ROUND)):
            self._renderers.submit(-1 - k, task)

    def run(
        self, prompts: list[Prompt], number: int, seed: int, adapter: str | None, progress: _Progress
    ) -> tuple[list[Description], Drawn]:
        """Writes the round's lines, judges their text in order, and draws those that may be drawn."""
        tasks = self._sample_tasks(prompts, number, seed, adapter)
        for i, sample_task in enumerate(tasks):
            self._samplers.submit(i, sample_task)
        written: dict[int, str] = {}
        descriptions: list[Description] = []
        drawn = Drawn()
        rendered: dict[int, str] = {}
        sizes: list[int] = []
        next_chunk = 0
        for pool, i, key in drain([self._samplers, self._renderers]):
            if pool is self._renderers and i < 0:
                self._normal_keys[-1 - i] = key
                continue
            if pool is self._renderers:
                rendered[i] = key
                progress("render", number, sum(sizes[k] for k in rendered), sum(sizes))
                continue
            written[i] = key
            # The guard remembers the lines before, so chunks pass it in their order, whatever came first.
            while next_chunk in written:
                accepted = self._read_chunk(written[next_chunk], number, descriptions, drawn)
                for task in self._render_tasks(accepted, number):
                    self._renderers.submit(len(sizes), task)
                    sizes.append(len(task.rows))
                next_chunk += 1
            progress("describe", number, len(descriptions), self.config.loop.lines)
        self._collect(rendered, drawn)
        if not self.normals.renderings and self._normal_keys:
            self._collect(self._normal_keys, self.normals)
        return descriptions, drawn

    def _sample_tasks(self, prompts: list[Prompt], number: int, seed: int, adapter: str | None) -> list[SampleTask]:
        config, lines = self.config.describe, self.config.loop.lines
        share, rest = divmod(lines, len(prompts))
        wanted = [(p.id, p.text, share + (k < rest)) for k, p in enumerate(prompts)]
        wanted = [w for w in wanted if w[2]]
        chunks: list[list[tuple[str, str, int]]] = [[]]
        for want in wanted:
            if chunks[-1] and sum(n for _, _, n in chunks[-1]) + want[2] > config.chunk:
                chunks.append([])
            chunks[-1].append(want)
        return [
            SampleTask(
                tuple(chunk), number, seed * 10_000 + i, adapter, self._sample_inputs(chunk, seed * 10_000 + i, adapter)
            )
            for i, chunk in enumerate(chunks)
        ]

    def _sample_inputs(self, chunk: list[tuple[str, str, int]], seed: int, adapter: str | None) -> dict[str, Any]:
        keys = {"sampler", "temperature", "top_p", "max_tokens"}
        return {
            "prompts": [list(row) for row in chunk],
            "seed": seed,
            "adapter": adapter,
            "model": self.sampler_identity,
            "config": self.config.describe.model_dump(mode="json", include=keys),
            "threads": self.config.cluster.samplers.threads,
            "versions": versions.computing(),
        }

    def _read_chunk(
        self, key: str, number: int, descriptions: list[Description], drawn: Drawn
    ) -> list[tuple[str, str, str]]:
        """Judges a chunk's lines; returns (id, text, prompt id) of those that may be drawn."""
        output = self.store.find("sample", key)
        assert output is not None, f"sample/{key} was reported but is not in the store"
        drawn.seconds["describe"] = drawn.seconds.get("describe", 0.0) + output.seconds
        rows = output.table().to_pylist()
        drawn.raw += [(row["prompt_id"], row["raw"]) for row in rows]
        accepted = []
        for row, (text, reason) in zip(rows, self.guard.judge([row["raw"] for row in rows]), strict=True):
            descriptions.append(
                Description(
                    row["id"], row["prompt_id"], number, row["raw"], text, "rejected" if reason else "ok", reason
                )
            )
            if not reason:
                accepted.append((row["id"], text, row["prompt_id"]))
        return accepted

    def _render_tasks(self, accepted: list[tuple[str, str, str]], number: int) -> list[RenderTask]:
        """Chunks of at most `render.chunk` descriptions; none where no line was accepted."""
        size = self.config.render.chunk
        return [self._render_task(accepted[i : i + size], number) for i in range(0, len(accepted), size)]

    def _render_task(self, rows: list[tuple[str, str, str]], number: int) -> RenderTask:
        config = self.config
        seeded = [(id_, text, image_seed(config.seed, id_)) for id_, text, _ in rows]
        normals, normal_ids = None, None
        if config.render.mode == "img2img":
            train = self.prepared.normals.train
            picks = [seed % len(train) for _, _, seed in seeded]
            normals = tuple(train.images[i] for i in picks)
            normal_ids = [train.ids[i] for i in picks]
        inputs = {
            "rows": [list(row) for row in seeded],
            "normals": normal_ids,
            "model": self.renderer_identity,
            "config": config.render.model_dump(mode="json", exclude={"chunk", "normals"}),
            "threads": config.cluster.renderers.threads,
            "features": feature_inputs(config.backbone, self.prepared.backbone.identity, self.prepared.patches),
            "versions": versions.computing(),
        }
        return RenderTask(tuple(seeded), number, normals, inputs)

    def _collect(self, rendered: dict[int, str], drawn: Drawn) -> None:
        parts = []
        for i in sorted(rendered):
            output = self.store.find("render", rendered[i])
            assert output is not None, f"render/{rendered[i]} was reported but is not in the store"
            drawn.seconds["render"] = drawn.seconds.get("render", 0.0) + output.seconds
            renderings = from_table(Rendering, output.table())
            drawn.renderings += renderings
            good = [r for r in renderings if r.status == "ok"]
            drawn.ids += [r.id for r in good]
            drawn.images += [decode(r.image, r.id) for r in good]
            features = read_features(output, patches=self.prepared.patches)
            if features is not None:
                parts.append(features)
        drawn.features = Features.join(parts) if parts else self.prepared.train.take([])


def image_seed(seed: int, id_: str) -> int:
    """The seed of a description's image: 31 bits of a hash of the run's seed and the description's id."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{id_}".encode()).digest()[:4], "big") >> 1
