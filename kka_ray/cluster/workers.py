"""The actors: a sampler and a renderer that stay loaded across rounds and commit their chunks to the store themselves.

A chunk that is committed is never made again: a worker that is started anew, or a run that is resumed, finds it. Rows
that cannot be made (`Task.failed`) are rows of the output with their reason. They are part of its key, so a later run,
in which they may not fail, makes the chunk undisturbed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import ray

from kka_ray.cluster.leases import open_store
from kka_ray.cluster.pool import Task
from kka_ray.config.models import BackboneConfig, DescribeConfig, PoolConfig, RenderConfig, RuntimeEnv
from kka_ray.describe.sampler import mixed, model_identity
from kka_ray.errors import StageError
from kka_ray.records import Rendering, from_table, to_table
from kka_ray.store import Attempt, Output, Store

if TYPE_CHECKING:
    from kka_ray.describe.sampler import Sampler
    from kka_ray.features.backbone import Backbone
    from kka_ray.render.matching import Drawing, Matcher
    from kka_ray.render.renderer import Renderer

SAMPLE_VERSION = 9
_UNKNOWN = "unknown"
"""No adapter's key."""


@dataclass(frozen=True, kw_only=True)
class SampleTask(Task):
    """Lines to be written: a row is its id (`sample_row`), a prompt's text and how many; all with one seed and one
    adapter."""

    rows: tuple[tuple[str, str, int], ...]
    round: int
    seed: int
    adapter: str | None
    """Key of the adapter's output in stage `dpo`, or None for the base model."""
    inputs: dict[str, Any]
    """What the key of the chunk's output is made of, as long as no row is at fault."""


@dataclass(frozen=True, kw_only=True)
class ScoreTask(Task):
    """Lines whose log-probabilities under the base model are wanted: a row is an id, a prompt and its completion."""

    rows: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class RenderTask(Task):
    """Descriptions to be drawn: (id, text, seed) each, with the normal image to edit where the mode asks for one."""

    rows: tuple[tuple[str, str, int], ...]
    round: int
    normals: tuple[Any, ...] | None
    inputs: dict[str, Any]
    features: dict[str, Any]
    """What the key of the features is made of beside the images."""

    def part(self, start: int, stop: int) -> Self:
        normals = self.normals[start:stop] if self.normals is not None else None
        return replace(self, rows=self.rows[start:stop], normals=normals)


class SamplerWorker:
    """Writes lines. The result for a `SampleTask` is the key of an output of stage `sample`: a table with id,
    prompt_id, raw and error; that for a `ScoreTask` a list of log-probabilities a row, and the usage of an API."""

    engine: Sampler

    def __init__(self, store: str, config: DescribeConfig, threads: int, device: str) -> None:
        self.store = open_store(store)
        self.config, self.threads, self.device = config, threads, device
        self.adapter: str | None = None

    def load(self) -> None:
        """Loads the engine; called once, before anything else."""
        import torch

        from kka_ray.describe.sampler import build_sampler

        torch.set_num_threads(self.threads)
        self.engine = build_sampler(self.config, self.device)
        self.model = model_identity(self.config.sampler)

    def work(self, task: SampleTask | ScoreTask) -> str | tuple[list[list[float]], dict[str, int]]:
        """Makes a chunk, unless it is in the store."""
        self.engine.take_usage()  # of what failed before: its answers are lost
        if isinstance(task, ScoreTask):
            return self._score(task)
        check_identity("the sampler's model", self.model, task.inputs["model"])
        return self.store.get_or_make("sample", SAMPLE_VERSION, _inputs(task), lambda a: self._make(task, a)).key

    def probe(self, task: SampleTask | ScoreTask) -> None:
        """Does the work of a part and keeps nothing."""
        if isinstance(task, ScoreTask):
            self._score(task)
        else:
            self._sample(task)

    def sleep(self) -> None:
        """Gives memory back until the next call, where the configuration says so."""
        self.engine.sleep()

    def _use(self, adapter: str | None) -> None:
        if adapter == self.adapter:
            return
        folder = _adapter_folder(self.store, adapter)
        self.adapter = _UNKNOWN  # until it is loaded whole: half of an adapter is no policy
        self.engine.load_adapter(folder)
        self.adapter = adapter

    def _sample(self, task: SampleTask) -> list[dict[str, str]]:
        """A row a line, those of the prompts at fault included."""
        self._use(task.adapter)
        rows = []
        for place, count in enumerate(sorted({n for _, _, n in task.rows})):
            group = [(id_, text) for id_, text, n in task.rows if n == count]
            good = [(id_, text) for id_, text in group if id_ not in task.failed]
            # Each call numbers its prompts from 0: with one seed two groups would draw the same random numbers.
            seed = mixed(task.seed, place) if place else task.seed
            written = self.engine.sample([text for _, text in good], count, seed) if good else []
            lines_of = dict(zip([id_ for id_, _ in good], written, strict=True))
            for row_id, _ in group:
                ids, error = line_ids(task.round, row_id, count), task.failed.get(row_id, "")
                for id_, raw in zip(ids, lines_of.get(row_id, [""] * count), strict=True):
                    rows.append({"id": id_, "prompt_id": _prompt_of(row_id)[0], "raw": raw, "error": error})
        return rows

    def _score(self, task: ScoreTask) -> tuple[list[list[float]], dict[str, int]]:
        """Natural-log probabilities of each row's tokens, none for the rows at fault; and what an API was asked."""
        self._use(None)
        good = [row for row in task.rows if row[0] not in task.failed]
        values = self.engine.log_probs([row[1] for row in good], [row[2] for row in good]) if good else []
        of = dict(zip([row[0] for row in good], values, strict=True))
        return [of.get(row[0], []) for row in task.rows], self.engine.take_usage()

    def _make(self, task: SampleTask, attempt: Attempt) -> None:
        names = ("id", "prompt_id", "raw", "error")
        attempt.table(pa.Table.from_pylist(self._sample(task), schema=pa.schema([(n, pa.string()) for n in names])))
        if usage := self.engine.take_usage():
            attempt.json(usage, "usage")


class RenderWorker:
    """Draws descriptions and extracts the features of what it drew.

    Its result are the keys of two outputs: of stage `render`, a table of `Rendering`, and of stage `features`, those of
    the images drawn, or None where none was. So other detectors or another backbone need no image drawn anew.
    """

    renderer: Renderer
    backbone: Backbone
    matcher: Matcher | None

    def __init__(
        self, store: str, config: RenderConfig, backbone: BackboneConfig, patches: bool, threads: int, device: str
    ) -> None:
        self.store = open_store(store)
        self.config, self.backbone_config, self.patches = config, backbone, patches
        self.threads, self.device = threads, device

    def load(self) -> None:
        """Loads the pipeline and the backbone; called once, before anything else."""
        from kka_ray.features.backbone import Backbone
        from kka_ray.render.index import pipeline_identity
        from kka_ray.render.matching import Matcher
        from kka_ray.render.renderer import Renderer

        self.renderer = Renderer.load(self.config, self.device, self.threads)
        self.model = pipeline_identity(self.config.pipeline)
        self.backbone = Backbone.load(self.backbone_config, self.device)
        self.matcher = Matcher.load(self.config.pipeline, self.device) if self.config.match else None

    def work(self, task: RenderTask) -> tuple[str, str | None]:
        """Makes a chunk and its features, unless they are in the store."""
        from kka_ray.render.renderer import VERSION

        check_identity("the renderer", self.model, task.inputs["model"])
        check_identity("the backbone", self.backbone.identity, task.features["backbone"])
        drawn = self.store.get_or_make("render", VERSION, _inputs(task), lambda a: self._make(task, a))
        return drawn.key, self._features(drawn, task)

    def probe(self, task: RenderTask) -> None:
        """Does the work of a part and keeps nothing."""
        import numpy as np

        drawn = [d.image for d in self._draw(task).values() if isinstance(d.image, np.ndarray)]
        if drawn:
            self.backbone.extract(drawn, self.patches)

    def _draw(self, task: RenderTask) -> dict[str, Drawing]:
        """Pictures, or why there are none, by id, in the order of the rows."""
        from kka_ray.render.matching import Drawing, draw_matching
        from kka_ray.render.renderer import DrawError

        good = [i for i, (id_, _, _) in enumerate(task.rows) if id_ not in task.failed]
        texts, seeds = [task.rows[i][1] for i in good], [task.rows[i][2] for i in good]
        normals = None if task.normals is None else [task.normals[i] for i in good]
        drawn: list[Drawing] = []
        if good and self.matcher is not None:
            assert self.config.match
            drawn = draw_matching(self.renderer, self.matcher, self.config.match, texts, seeds, normals)
        elif good:
            images = self.renderer.draw(texts, seeds, normals)
            drawn = [Drawing(image, seed) for image, seed in zip(images, seeds, strict=True)]
        of = dict(zip([task.rows[i][0] for i in good], drawn, strict=True))
        return {id_: of[id_] if id_ in of else Drawing(DrawError(task.failed[id_]), seed) for id_, _, seed in task.rows}

    def _make(self, task: RenderTask, attempt: Attempt) -> None:
        import numpy as np

        from kka_ray.data.decode import encode_png

        drawn = self._draw(task)
        records = []
        for id_, drawing in drawn.items():
            image, seed = drawing.image, drawing.seed
            if isinstance(image, np.ndarray):
                png = encode_png(image)
                digest = hashlib.sha256(png).hexdigest()
                records.append(Rendering(id_, task.round, seed, "ok", png, digest, match=drawing.match))
            else:
                records.append(Rendering(id_, task.round, seed, "failed", b"", "", image.reason))
        attempt.table(to_table(Rendering, records))

    def _features(self, output: Output, task: RenderTask) -> str | None:
        from kka_ray.data.decode import decode
        from kka_ray.features.cache import write_features
        from kka_ray.prepare import FEATURES_VERSION

        drawn = [row for row in from_table(Rendering, output.table()) if row.status == "ok"]
        if not drawn:
            return None

        def make(attempt: Attempt) -> None:
            images = [decode(row.image, row.id) for row in drawn]
            write_features(attempt, self.backbone.extract(images, self.patches))

        inputs = task.features | {"drawn": [row.image_sha256 for row in drawn]}
        return self.store.get_or_make("features", FEATURES_VERSION, inputs, make).key


def _inputs(task: SampleTask | RenderTask) -> dict[str, Any]:
    """What the key of a chunk's output is made of, rows at fault included."""
    return task.inputs | ({"failed": dict(task.failed)} if task.failed else {})


def check_identity(what: str, found: str, wanted: str) -> None:
    """Raises StageError if a worker has loaded other weights than the driver made the keys of its outputs with."""
    if found != wanted:
        raise StageError(
            f"a node has another version of {what} ({found}) than the driver ({wanted}): name a commit, as in "
            "hub:OWNER/NAME@COMMIT, or a folder that all nodes share"
        )


def sample_row(prompt_id: str, first: int) -> str:
    """Id of a row of a `SampleTask`: the lines of a prompt from number `first` on, as many may be several chunks'."""
    return f"{prompt_id}+{first}" if first else prompt_id


def _prompt_of(row_id: str) -> tuple[str, int]:
    prompt_id, _, first = row_id.partition("+")
    return prompt_id, int(first or 0)


def line_ids(round: int, row_id: str, count: int) -> list[str]:
    """Ids of the lines that are written for a row of a `SampleTask` in a round."""
    prompt_id, first = _prompt_of(row_id)
    return [f"r{round}-{prompt_id}-s{k:03d}" for k in range(first, first + count)]


def _adapter_folder(store: Store, key: str | None) -> Path | None:
    return None if key is None else store.reported("dpo", key).local / "adapter"


def start(cls: type, pool: PoolConfig, device: str, seat: Any, *arguments: Any) -> Any:
    """An actor of `cls` with a pool's resources, where Ray's scheduling strategy `seat` says if there is one.

    Who dies is replaced by the pool, not by Ray.
    """
    options: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "max_restarts": 0, "max_task_retries": 0}
    environment = runtime_env(pool.runtime_env, device_of(pool, device))
    if environment:
        options["runtime_env"] = environment
    if seat is not None:
        options["scheduling_strategy"] = seat
    return ray.remote(**options)(cls).remote(*arguments, pool.threads, device_of(pool, device))


def device_of(pool: PoolConfig, device: str) -> str:
    """`cuda` where a pool's actors compute on GPUs, else `cpu`; `device` is `cluster.device`."""
    return "cuda" if pool.gpus and device == "auto" else "cpu"


def runtime_env(config: RuntimeEnv, device: str) -> dict[str, Any]:
    """Ray's form of the runtime environment of processes that compute on `device`, without what is empty."""
    variables = dict(config.env_vars)
    if device == "cpu" and ray.cluster_resources().get("GPU"):
        # A process that asks Ray for no GPU sees those of its node, and libraries take memory of the first one.
        variables.setdefault("CUDA_VISIBLE_DEVICES", "")
    return {k: v for k, v in (("env_vars", variables), ("pip", list(config.pip))) if v}
