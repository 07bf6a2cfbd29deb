"""One round of describing and rendering, streamed: descriptions are drawn while others are still being written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from kka_ray import versions
from kka_ray.cluster.budget import BudgetError, ErrorBudget
from kka_ray.cluster.placement import Kept
from kka_ray.cluster.pool import Pool, drain
from kka_ray.cluster.workers import (
    RenderTask,
    RenderWorker,
    SamplerWorker,
    SampleTask,
    ScoreTask,
    device_of,
    line_ids,
    sample_row,
    start,
)
from kka_ray.config.models import ClusterConfig, PoolConfig, RunConfig
from kka_ray.data.base import content_hash
from kka_ray.data.decode import decode
from kka_ray.describe.guard import Guard
from kka_ray.describe.sampler import engine_versions, model_identity
from kka_ray.features.base import Features
from kka_ray.features.cache import read_features
from kka_ray.features.device import has_bfloat16
from kka_ray.prepare import Prepared, feature_inputs, needs_patches
from kka_ray.records import Description, Prompt, Rendering, from_table
from kka_ray.render.index import pipeline_identity
from kka_ray.store import Store, stage_key

NORMALS_ROUND = -1
"""What `Rendering.round` says of drawn normal captions, which belong to no round."""


EDITED = slice(0, None, 4)
"""Of the training normals: those that are edited with `render.mode: img2img`. Evaluators do not learn from these, whose
edits they would otherwise find nearer to normal than those of any other photograph."""


class Progress(Protocol):
    """Hears of what a run does."""

    def __call__(self, stage: str, round: int, done: int, total: int) -> None:
        """`done` of `total` items of a stage are there."""


@dataclass
class Drawn:
    """What a round drew. `ids` and `features` hold those drawn without error, in the order of the lines."""

    renderings: list[Rendering] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    features: Features = field(default_factory=lambda: Features(np.zeros((0, 0), np.float32)))
    raw: list[tuple[str, str]] = field(default_factory=list)
    """(prompt id, raw line) of every line written."""
    usage: Counter[str] = field(default_factory=Counter)
    """What was asked of an API for the round's lines: requests, retries, tokens."""
    mismatched: set[str] = field(default_factory=set)
    """Ids of images that do not show what their text says, where the configuration asks (`render.match`)."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds that workers spent on the round's chunks, by stage, whenever that was."""

    def images(self, ids: Sequence[str]) -> list[np.ndarray]:
        """Images by id, in that order, decoded anew each time: those of all rounds may be more than memory holds."""
        png = {row.id: row.image for row in self.renderings if row.status == "ok"}
        return [decode(png[id_], id_) for id_ in ids]


class Pools:
    """The pools of samplers and renderers of a run."""

    def __init__(self, config: RunConfig, store: str) -> None:
        cluster, patches = config.cluster, needs_patches(config)
        self.turns = cluster.mode == "colocated"
        """Whether they have one place for both, and take turns."""
        self.samplers = Pool(
            "samplers",
            lambda seat: start(SamplerWorker, cluster.samplers, cluster.device, seat, store, config.describe),
            cluster.samplers,
            cluster,
        )
        self.renderers = Pool(
            "renderers",
            lambda seat: start(
                RenderWorker,
                cluster.renderers,
                cluster.device,
                seat,
                store,
                config.render,
                config.backbone,
                patches,
            ),
            cluster.renderers,
            cluster,
        )
        size = PoolConfig(workers=config.preference.workers, cpus=cluster.train_cpus, gpus=cluster.train_gpus)
        self._dpo = Kept("DPO workers", size, cluster)
        if not config.loop.rounds:
            self._dpo.free()

    def open(self) -> None:
        """Starts the actors of both, where both have a place: the larger first, as the plan has it.

        Ray puts a small worker where most is left: on the only node that has room for a large one, if there is one. So
        the places of the DPO workers are kept as well, in their turn. Raises NotFreeError if places are not free.
        """
        if self.turns:
            return
        parts: list[Pool | Kept] = [self.renderers, self.samplers, self._dpo]
        placed = True
        for part in sorted(parts, key=_takes, reverse=True):
            # A pool without GPUs is not waited for: places that are kept now might be the only ones for its workers.
            if part is not self._dpo or placed:
                part.open()
            placed = placed and part.size.gpus > 0

    def let_dpo_in(self) -> None:
        """Gives up the places that were kept for the DPO workers, for they start."""
        self._dpo.free()

    def close(self) -> None:
        """Ends the actors of both pools and gives up the places for DPO, even if some of that fails."""
        with ExitStack() as stack:
            for end in (self._dpo.free, self.renderers.stop, self.samplers.stop):
                stack.callback(end)


def _takes(part: Pool | Kept) -> tuple[float, float]:
    """How much a worker takes: GPUs, then CPUs."""
    return part.size.gpus, part.size.cpus


def sampler_libraries(config: RunConfig) -> dict[str, Any]:
    """The libraries of the samplers' own, for the keys of what they make: those that are here, or those that Ray is to
    install for their processes alone. Raises ConfigError if vLLM is asked for and neither here nor to be installed."""
    installed = config.cluster.samplers.runtime_env.pip
    return {"pip": list(installed)} if installed else engine_versions(config.describe.sampler)


class Streamer:
    """The guard between samplers and renderers, and what goes to either."""

    def __init__(self, config: RunConfig, store: Store, prepared: Prepared, guard: Guard, pools: Pools) -> None:
        self.config, self.store, self.prepared, self.guard = config, store, prepared, guard
        self.normals = Drawn()
        """The normal captions that were drawn, once a round has run after `submit_normals`."""
        self.sampler_identity = model_identity(config.describe.sampler)
        self._sampler_versions = versions.computing() | sampler_libraries(config)
        self.renderer_identity = pipeline_identity(config.render.pipeline)
        self._pools, self._samplers, self._renderers, self._turns = pools, pools.samplers, pools.renderers, pools.turns
        self._later: list[tuple[int, RenderTask]] = []
        """Chunks for the renderers, while it is the samplers' turn."""
        self._unread: dict[int, dict[str, Any]] = {}
        """Inputs of the chunks for the renderers of which it is not known what they drew, by number."""
        self._early: list[tuple[Pool, int, Any]] = []
        """What the renderers finished while lines were scored."""

    def log_probs(self, prompts: list[str], completions: list[str]) -> tuple[list[list[float]], dict[str, int], int]:
        """Token log-probabilities under the untuned model, shared out among the samplers, what was asked of an API for
        them, and how many lines could not be scored: these have none. The renderers are kept at work meanwhile."""
        rows = [(f"l{i:06d}", *pair) for i, pair in enumerate(zip(prompts, completions, strict=True))]
        size = self.config.describe.chunk
        budget = ErrorBudget("scoring the lines", len(rows), self.config.cluster)
        self._samplers.found = lambda id_, reason: budget.add([id_], reason)
        # Parts of a fixed size: what is computed together must not depend on the number of workers.
        for k, i in enumerate(range(0, len(rows), size)):
            self._samplers.submit(k, ScoreTask(rows=tuple(rows[i : i + size])))
        parts: dict[int, Any] = {}
        for pool, k, found in drain([self._samplers, self._renderers], until=[self._samplers]):
            if pool is self._samplers:
                parts[k] = found
            else:
                self._early.append((pool, k, found))
        usage: Counter[str] = Counter()
        for _, taken in parts.values():
            usage.update(taken)
        return [row for k in sorted(parts) for row in parts[k][0]], dict(usage), len(budget.failed)

    def sampler_inputs(self) -> dict[str, Any]:
        """The sampler's part of the keys of what it makes."""
        return {
            "model": self.sampler_identity,
            "sampler": sampler_config(self.config),
            "threads": self.config.cluster.samplers.threads,
            "device": computes_on(self.config.cluster.samplers, self.config.cluster),
            "versions": self._sampler_versions,
        }

    def rest_samplers(self) -> None:
        """Lets samplers give memory back while others need it; they wake up by themselves with the next chunk."""
        self._samplers.rest()

    def submit_normals(self) -> None:
        """Hands captions of training normals to the renderers; `run` collects them with its round's images."""
        self._pools.open()  # else the renderers would start first, whichever are larger
        train, config = self.prepared.normals.train, self.config
        order = np.random.default_rng(config.seed).permutation(len(train))
        rows = [(f"n{k:04d}", train.captions[i], "") for k, i in enumerate(order[: config.render.normals])]
        for k, task in enumerate(self._render_tasks(rows, NORMALS_ROUND)):
            self._draw(-1 - k, task)

    def run(
        self,
        prompts: list[Prompt],
        number: int,
        seed: int,
        adapter: str | None,
        progress: Progress,
        written_all: Callable[[list[tuple[str, str]]], None],
    ) -> tuple[list[Description], Drawn]:
        """Writes the round's lines, judges their text in order, and draws those that may be drawn.

        `written_all` hears of (prompt id, raw line) of all lines while the samplers are there, and may score them.
        Raises StageError if more rows fail than `cluster.max_failed_share` and `max_failed_rows` allow.
        """
        tasks = self._sample_tasks(prompts, number, seed, adapter)
        self._watch_failures(tasks, number)
        for i, sample_task in enumerate(tasks):
            self._samplers.submit(i, sample_task)
        written: dict[int, str] = {}
        descriptions: list[Description] = []
        drawn = Drawn()
        rendered: dict[int, Drawn] = {}
        normals: dict[int, Drawn] = {}
        sizes: list[int] = []
        next_chunk = 0
        try:
            for pool, i, key in self._turn_by_turn(lambda: written_all(drawn.raw)):
                if pool is self._renderers:
                    del self._unread[i]
                    images = self._read_images(*key)
                    if i < 0:
                        normals[-1 - i] = images
                        continue
                    rendered[i] = images
                    progress("render", number, sum(sizes[k] for k in rendered), sum(sizes))
                    continue
                written[i] = key
                # The guard remembers the lines before, so chunks pass it in their order, whatever came first.
                while next_chunk in written:
                    accepted = self._read_chunk(written[next_chunk], number, descriptions, drawn)
                    for task in self._render_tasks(accepted, number):
                        self._draw(len(sizes), task)
                        sizes.append(len(task.rows))
                    next_chunk += 1
                progress("describe", number, len(descriptions), self.config.loop.lines)
                if next_chunk == len(tasks) and not self._turns:
                    written_all(drawn.raw)  # while the renderers go on
        except BudgetError:
            self._forget_failures()
            raise
        self._join(rendered, drawn)
        if normals:
            self._join(normals, self.normals)
        return descriptions, drawn

    def _draw(self, number: int, task: RenderTask) -> None:
        self._unread[number] = task.inputs
        if self._turns:
            self._later.append((number, task))
        else:
            self._renderers.submit(number, task)

    def _turn_by_turn(self, between: Callable[[], None]) -> Iterator[tuple[Pool, int, Any]]:
        """Chunks of both pools as they are ready; where the pools take turns, each ends before the next begins, and
        `between` is called then."""
        if not self._turns:
            for found in drain([self._samplers, self._renderers]):
                yield found
                while self._early:
                    yield self._early.pop(0)
            return
        yield from drain([self._samplers])
        between()
        self._samplers.stop()
        for number, task in self._later:
            self._renderers.submit(number, task)
        self._later = []
        yield from drain([self._renderers])
        self._renderers.stop()

    def _watch_failures(self, tasks: list[SampleTask], number: int) -> None:
        """New error budgets for a round."""
        config = self.config
        images = config.loop.lines + (config.render.normals if not self.normals.renderings else 0)
        self._lost_lines = ErrorBudget(f"writing the lines of round {number}", config.loop.lines, config.cluster)
        self._lost_images = ErrorBudget(f"drawing the images of round {number}", images, config.cluster)
        count = {id_: n for task in tasks for id_, _, n in task.rows}
        self._samplers.found = lambda row, reason: self._lost_lines.add(line_ids(number, row, count[row]), reason)
        self._renderers.found = lambda id_, reason: self._lost_images.add([id_], reason)
        self._failures: set[str] = set()
        """Keys of the rendered chunks with failed rows."""

    def _read_images(self, key: str, of_features: str | None) -> Drawn:
        """What a chunk drew; its failed rows count against the budget."""
        output = self.store.reported("render", key)
        renderings = from_table(Rendering, output.table())
        for row in renderings:
            if row.status == "failed":
                self._failures.add(key)
                self._lost_images.add([row.id], row.error)
        good = [row for row in renderings if row.status == "ok"]
        extracted = self.store.reported("features", of_features) if of_features else None
        patches = self.prepared.patches
        match = self.config.render.match
        return Drawn(
            renderings,
            [row.id for row in good],
            read_features(extracted, patches=patches) if extracted else self.prepared.train.take([]),
            mismatched={row.id for row in good if match and row.match is not None and row.match < match.least},
            seconds={"render": output.seconds + (extracted.seconds if extracted else 0.0)},
        )

    def _forget_failures(self) -> None:
        """Drops the chunks with failed images from the store, so that the same command tries them again.

        Those that were drawn and not read yet count as well. Chunks with rows at fault, as failed lines are, may stay:
        they have keys of their own.
        """
        from kka_ray.render.renderer import VERSION

        self._renderers.stop()  # else they would commit more
        for key in self._failures:
            self.store.remove("render", key)
        for inputs in self._unread.values():
            key = stage_key("render", VERSION, inputs)
            output = self.store.find("render", key)
            if output and any(row.status == "failed" for row in from_table(Rendering, output.table())):
                self.store.remove("render", key)

    def _sample_tasks(self, prompts: list[Prompt], number: int, seed: int, adapter: str | None) -> list[SampleTask]:
        config, lines = self.config.describe, self.config.loop.lines
        share, rest = divmod(lines, len(prompts))
        wanted = []
        for k, prompt in enumerate(prompts):
            of_prompt = share + (k < rest)
            for first in range(0, of_prompt, config.chunk):
                count = min(config.chunk, of_prompt - first)
                wanted.append((sample_row(prompt.id, first), prompt.text, count))
        chunks: list[list[tuple[str, str, int]]] = [[]]
        for want in wanted:
            if chunks[-1] and sum(n for _, _, n in chunks[-1]) + want[2] > config.chunk:
                chunks.append([])
            chunks[-1].append(want)
        return [
            SampleTask(
                rows=tuple(chunk),
                round=number,
                seed=seed * 10_000 + i,
                adapter=adapter,
                inputs=self._sample_inputs(chunk, seed * 10_000 + i, adapter),
            )
            for i, chunk in enumerate(chunks)
        ]

    def _sample_inputs(self, chunk: list[tuple[str, str, int]], seed: int, adapter: str | None) -> dict[str, Any]:
        return {
            "prompts": [list(row) for row in chunk],
            "seed": seed,
            "adapter": adapter,
            "config": sample_config(self.config),
            **self.sampler_inputs(),
        }

    def _read_chunk(
        self, key: str, number: int, descriptions: list[Description], drawn: Drawn
    ) -> list[tuple[str, str, str]]:
        """Judges a chunk's lines; returns (id, text, prompt id) of those that may be drawn."""
        output = self.store.reported("sample", key)
        drawn.seconds["describe"] = drawn.seconds.get("describe", 0.0) + output.seconds
        if "usage.json" in output.files:
            drawn.usage.update(output.json("usage"))
        rows = output.table().to_pylist()
        good = [row for row in rows if not row["error"]]
        drawn.raw += [(row["prompt_id"], row["raw"]) for row in good]
        judged = dict(zip([row["id"] for row in good], self.guard.judge([row["raw"] for row in good]), strict=True))
        accepted = []
        for row in rows:
            id_, prompt_id, raw, error = row["id"], row["prompt_id"], row["raw"], row["error"]
            if error:
                self._lost_lines.add([id_], error)
            text, reason = judged.get(id_, ("", f"error: {error}"))
            descriptions.append(Description(id_, prompt_id, number, raw, text, "rejected" if reason else "ok", reason))
            if not reason:
                accepted.append((id_, text, prompt_id))
        return accepted

    def _render_tasks(self, accepted: list[tuple[str, str, str]], number: int) -> list[RenderTask]:
        """Chunks of at most `render.chunk` descriptions; none where no line was accepted."""
        size = self.config.render.chunk
        return [self._render_task(accepted[i : i + size], number) for i in range(0, len(accepted), size)]

    def _render_task(self, rows: list[tuple[str, str, str]], number: int) -> RenderTask:
        config = self.config
        seeded = [(id_, text, image_seed(config.seed, id_)) for id_, text, _ in rows]
        normals, edited = None, None
        if config.render.mode == "img2img":
            train = self.prepared.normals.train
            edited_rows = range(len(train))[EDITED]
            picks = [edited_rows[seed % len(edited_rows)] for _, _, seed in seeded]
            normals = tuple(train.images[i] for i in picks)
            edited = [content_hash(image) for image in normals]
        computing = {
            "threads": config.cluster.renderers.threads,
            "device": computes_on(config.cluster.renderers, config.cluster),
            "versions": versions.computing(config.cluster.renderers.runtime_env.pip),
        }
        inputs = {
            "rows": [list(row) for row in seeded],
            "normals": edited,
            "model": self.renderer_identity,
            "config": render_config(config),
            **computing,
        }
        features = feature_inputs(config.backbone, self.prepared.backbone.identity, self.prepared.patches) | computing
        return RenderTask(rows=tuple(seeded), round=number, normals=normals, inputs=inputs, features=features)

    def _join(self, parts: dict[int, Drawn], drawn: Drawn) -> None:
        """Adds the chunks' images in their order."""
        chunks = [parts[i] for i in sorted(parts)]
        drawn.renderings += [row for chunk in chunks for row in chunk.renderings]
        drawn.ids += [id_ for chunk in chunks for id_ in chunk.ids]
        drawn.mismatched |= {id_ for chunk in chunks for id_ in chunk.mismatched}
        drawn.features = Features.join([chunk.features for chunk in chunks]) if chunks else self.prepared.train.take([])
        drawn.seconds["render"] = sum(chunk.seconds["render"] for chunk in chunks)


def computes_on(pool: PoolConfig, cluster: ClusterConfig) -> str:
    """What the actors of a pool compute on, as far as results depend on it: a GPU, or a CPU with or without bfloat16.

    A pool's machines are taken to be of one kind, which is this one's kind where they have no GPU.
    """
    if device_of(pool, cluster.device) == "cuda":
        return "cuda"
    return "cpu, bfloat16" if has_bfloat16(torch.device("cpu")) else "cpu"


def sampler_config(config: RunConfig) -> dict[str, Any]:
    """What the sampler's policy depends on."""
    sampler = config.describe.sampler
    return sampler.model_dump(mode="json", exclude=set(sampler.INCIDENTAL))


def sample_config(config: RunConfig) -> dict[str, Any]:
    """What written lines depend on beside the sampler."""
    return config.describe.model_dump(mode="json", include={"temperature", "top_p", "max_tokens"})


def render_config(config: RunConfig) -> dict[str, Any]:
    """What drawn images depend on."""
    unused = set() if config.render.mode == "img2img" else {"strength"}
    return config.render.model_dump(mode="json", exclude={"chunk", "normals", *unused})


def image_seed(seed: int, id_: str) -> int:
    """The seed of a description's image: 31 bits of a hash of the run's seed and the description's id."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{id_}".encode()).digest()[:4], "big") >> 1
