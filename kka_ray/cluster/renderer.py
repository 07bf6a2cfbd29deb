"""Training of the built-in renderer as a Ray Train job, data-parallel over its workers and resumable."""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kka_ray import assets, tracking
from kka_ray.cluster import train
from kka_ray.cluster.plan import Phase, Plan, Share
from kka_ray.cluster.session import nodes, session
from kka_ray.config.loading import dump, load
from kka_ray.config.models import BackboneConfig
from kka_ray.config.renderer import RendererConfig
from kka_ray.errors import AssetError, ConfigError, DataError, ResourceError, StageError
from kka_ray.files import write_json, write_text, written

if TYPE_CHECKING:
    from PIL.Image import Image

    from kka_ray.render.training import TrainingData
    from kka_ray.render.transformer import FlowTransformer

_LOG = "training.jsonl"
_RUN = "mlflow_run"
_MARK = ".driver"
_SEEN_WITHIN = 60.0
"""Seconds until a file on shared storage is seen by every node."""
_MATCHED = 20_000
"""Images at most that the similarity to texts is learned from."""
_DATA = "data.safetensors"
_COUNTS = "sources.json"
_DATA_FORMAT = 3
"""Raised when other data would be made of the same configuration."""
_MAY_CHANGE = frozenset({"steps", "decay_from", "ema", "checkpoint_every"})
"""Settings that say how a training ends, and what it keeps: one that goes on may have others than it began with."""


def train_renderer(config: RendererConfig, say: Callable[[str], None], made_by: str | None = None) -> Path:
    """Trains, or goes on with, the renderer of a configuration; returns the folder of the diffusers pipeline.

    Checkpoints, a line of `training.jsonl` every 50 steps, grids of samples, `sources.json` with the images of each
    source and what was left out of it, and `config.yaml` lie in OUTPUT/NAME; the same command, or one with that
    `config.yaml`, goes on from the last checkpoint and repeats an uninterrupted training. Metrics and grids go to
    MLflow as well. `made_by` says in the model card how the weights came about.

    Raises ConfigError if there is a checkpoint of a training with other images, network, start or settings, but for
    those that say how it ends, or if a worker's node has another folder there than this one; DataError if a source's
    folder is not there; ResourceError if the workers do not fit the cluster.
    """
    from kka_ray.render.sources import check_folders
    from kka_ray.render.training import CHECKPOINT, check_checkpoint

    check_folders(config)
    folder = _folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "checkpoint" / CHECKPOINT).is_file():
        # The images can only be compared by the workers, which have them; the folder's configuration is still the old.
        check_checkpoint(folder / "checkpoint", _identity(config))
    write_text(folder / "config.yaml", dump(config))
    say(f"training {config.name}: {config.training.steps} steps of {config.training.batch}; log: {folder / _LOG}")
    with session(config.cluster):
        _plan(config).check(nodes())
        # The workers' current folder is another.
        here: dict[str, Any] = {
            "data": str(Path(config.data).expanduser().resolve()),
            "start": config.start and assets.absolute(config.start),
            "tracking": config.tracking.model_copy(
                update={"uri": config.tracking.uri and tracking.absolute(config.tracking.uri)}
            ),
        }
        config = config.model_copy(update=here)
        made_by = made_by or f"`kka renderer train configs/renderer/{config.name}.yaml`"
        mark = secrets.token_hex(8)
        arguments = {"config": config, "folder": str(folder), "mark": mark, "made_by": made_by}
        write_text(folder / _MARK, mark)
        try:
            train.run("renderer", renderer_worker, arguments, config.workers, config.cluster)
        finally:
            (folder / _MARK).unlink(missing_ok=True)
    pipeline = folder / "pipeline"
    if not (pipeline / "model_index.json").is_file():
        raise StageError(f"the training ended without a pipeline in {pipeline}")
    return pipeline


def finish_renderer(config: RendererConfig, steps: int, say: Callable[[str], None]) -> Path:
    """Good weights from a training that need not have ended; returns the folder of the diffusers pipeline.

    A copy of the last checkpoint is trained for `steps` more while its learning rate falls to a hundredth, as training
    NAME-K of its own, K being the checkpoint's step. The training itself stays as it is and can go on. Raises
    ConfigError if it has no checkpoint, or one of another training (see `train_renderer`), or if NAME-K was begun with
    other steps; ResourceError if NAME-K cannot be written.
    """
    from safetensors import safe_open

    from kka_ray.render.training import CHECKPOINT

    folder = _folder(config)
    checkpoint = folder / "checkpoint" / CHECKPOINT
    if not checkpoint.is_file():
        raise ConfigError(f"{config.name} has no checkpoint in {checkpoint.parent}; train it first")
    with safe_open(checkpoint, "pt") as content:
        reached = int(content.get_tensor("step"))
    total = reached + steps
    # Weights of before the decay would blur the average.
    ema = min(config.training.ema, max(0.1, 1 - 10 / steps))
    training = config.training.model_copy(update={"steps": total, "decay_from": reached / total, "ema": ema})
    branch = config.model_copy(update={"name": f"{config.name}-{reached}", "training": training})
    target = folder.with_name(branch.name)
    if (target / "config.yaml").is_file():
        before = load(target / "config.yaml", RendererConfig).training.steps - reached
        if before != steps:
            # Its checkpoint has left the plateau: with another end its learning rate would rise again, or not fall.
            raise ConfigError(
                f"{target} was begun with --steps {before}, not {steps}: give the same number to go on with it, or "
                "delete or rename that folder to finish the checkpoint anew"
            )
    for name in (_DATA, f"checkpoint/{CHECKPOINT}"):
        if not (target / name).exists():
            _share(folder / name, target / name)
    file = f"configs/renderer/{config.name}.yaml"
    first, second = f"`kka renderer train {file}`", f"`kka renderer finish {file} --steps {steps}`"
    made_by = f"{first}, stopped after {reached} of them, and {second}"
    return train_renderer(branch, say, made_by)


def _plan(config: RendererConfig) -> Plan:
    """The workers of a training."""
    cluster = config.cluster
    workers = Share("workers", config.workers, cluster.train_cpus, cluster.train_gpus, cluster.train_threads)
    remedy = "Lower workers, cluster.train_cpus or cluster.train_gpus; or join a larger cluster (cluster.address)"
    return Plan((Phase("train", (workers,)),), "the training", remedy)


def _folder(config: RendererConfig) -> Path:
    """Where a training keeps all that it writes."""
    return (Path(config.output).expanduser() / config.name).resolve()


def _share(source: Path, target: Path) -> None:
    """A hard link to a file, or its copy where the file system has no links; both are only ever replaced as a whole.

    Raises ResourceError if it cannot be copied either.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            with written(target) as temporary:
                shutil.copyfile(source, temporary)
    except OSError as error:
        raise ResourceError(
            f"{source} cannot be copied to {target.parent}: {error}. Give access to both and free some room, then run "
            "the same command again"
        ) from error


def renderer_worker(arguments: dict[str, Any]) -> None:
    """One worker: the first draws or reads the sources, all train, and the first writes the pipeline with its card."""
    import numpy as np
    import torch
    from ray.train.collective import broadcast_from_rank_zero

    from kka_ray.features.backbone import Backbone
    from kka_ray.features.text import TextEncoder
    from kka_ray.render.distillation import Teacher
    from kka_ray.render.domain import SAMPLE, save_reference
    from kka_ray.render.export import draw_samples, export_pipeline
    from kka_ray.render.matching import train_matcher
    from kka_ray.render.perceptual import Perceptual
    from kka_ray.render.sources import state_of_files
    from kka_ray.render.training import Settings, Trainer
    from kka_ray.render.training import train as train_network

    config, folder = arguments["config"], Path(arguments["folder"])
    _check_shared(folder, arguments["mark"])
    torch.set_num_threads(arguments["threads"])
    rank, world = train.rank()
    files = broadcast_from_rank_zero(state_of_files(config) if rank == 0 else None)
    data = _data(config, folder, rank, files)
    torch.manual_seed(config.training.seed)
    device = train.device(config.cluster)
    network = _network(config).to(device)
    teacher = None
    if config.distil:
        teacher = Teacher(copy.deepcopy(network).eval().requires_grad_(False), **config.distil.model_dump())
    identity = _identity(config) | {"data": data.identity()}
    compared = config.training.perceptual
    perceptual = None if compared is None else Perceptual.load(**compared.model_dump(), device=device)
    settings = Settings(**config.training.model_dump(exclude={"perceptual"}))
    trainer = Trainer(network, settings, rank, world, identity=identity, teacher=teacher, perceptual=perceptual)
    forward = torch.nn.parallel.DistributedDataParallel(network) if world > 1 else None

    track = _Track(config, folder) if rank == 0 else None

    def report(row: dict[str, float]) -> None:
        if track:
            track.metrics(row)

    def sample(average: FlowTransformer, step: int) -> None:
        assert track
        track.picture(draw_samples(average, config.samples, teacher), step)

    checkpoints = folder / "checkpoint"
    every = config.samples_every
    average = train_network(trainer, data, checkpoints, report, forward, sample if config.samples else None, every)
    if track:
        track.end()
        card = _card(config, sum(p.numel() for p in network.parameters()), arguments["made_by"])
        target = export_pipeline(average, folder / "pipeline", card, teacher)
        backbone = Backbone.load(BackboneConfig())
        rows = np.random.default_rng(0).permutation(len(data.images))[:_MATCHED].tolist()
        shown = backbone.extract([data.images[i] for i in rows[:SAMPLE]], patches=False).pooled
        save_reference(target, shown, backbone.identity, backbone.config.image_size)
        train_matcher(target, data, rows, backbone, TextEncoder(), config.network.max_text_tokens)


def _check_shared(folder: Path, mark: str) -> None:
    """Raises ConfigError unless the driver's mark is seen in a worker's folder, which then is the same.

    What is written elsewhere would be lost, and workers would wait for the first one's images for ever.
    """
    asked = time.monotonic()
    while not _holds(folder / _MARK, mark):
        if time.monotonic() - asked > _SEEN_WITHIN:
            raise ConfigError(
                f"{folder} is not the driver's folder on this node: name shared storage, as in -o output=/shared/"
                f"{folder.parent.name}"
            )
        time.sleep(1)


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_text() == text
    except OSError:
        return False  # not seen yet, or never to be


def _identity(config: RendererConfig) -> dict[str, Any]:
    """What a training and the checkpoint that it goes on from must have in common, as JSON values by name.

    Raises AssetError if there is no renderer `config.start`.
    """
    values = config.model_dump(mode="json", include={"network", "training", "captions", "distil"})
    # Each as one value, so that there and not there are compared as well.
    whole = {"perceptual": values["training"].pop("perceptual"), "distil": values.pop("distil")}
    settings = {name: value for name, value in tracking.flatten(values) if name.split(".")[-1] not in _MAY_CHANGE}
    # Without defaults, as those that another version adds change nothing.
    sources = [source.model_dump(mode="json", exclude_defaults=True) for source in config.sources]
    start = None if config.start is None else assets.resolve(config.start).identity
    return settings | whole | {"sources": sources, "start": start}


def _network(config: RendererConfig) -> FlowTransformer:
    """What a training begins with: random weights, or those of the renderer `config.start`.

    Raises ConfigError if the two networks differ, AssetError if there is no such renderer.
    """
    import torch

    from kka_ray.render.transformer import FlowTransformer

    wanted = config.network.model_dump()
    if config.start is None:
        return FlowTransformer(**wanted)
    folder = assets.resolve(config.start).path
    try:
        index = json.loads((folder / "model_index.json").read_text())
        network = FlowTransformer.from_pretrained(
            folder / "transformer", torch_dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise AssetError(f"start: {config.start} holds no weights of a built-in renderer: {error}") from error
    if index.get("distilled_guidance") is not None:
        raise ConfigError(
            f"start: {config.start} was distilled: it draws in a few steps, with guidance, and in no other way. Begin "
            "with the renderer that it was distilled from"
        )
    if wanted["overlap"] > network.config["overlap"]:
        network = network.overlapping(wanted["overlap"])
    differing = {name: network.config[name] for name, value in wanted.items() if network.config[name] != value}
    if differing:
        raise ConfigError(f"start: the network of {config.start} has {differing}; give `network` the same values")
    return network.train()


class _Track:
    """A training's metrics and samples, in its folder and in one MLflow run that a resumed training goes on with."""

    def __init__(self, config: RendererConfig, folder: Path) -> None:
        self.folder = folder
        output = folder.parent
        self._uri = config.tracking.uri or tracking.default_uri(output)
        known = folder / _RUN
        if not known.is_file():
            values = dict(tracking.flatten(config.model_dump(mode="json", exclude={"cluster", "tracking"})))
            run = tracking.start_run(self._uri, config.tracking.experiment, config.name, values)
            write_text(known, run)
        self._run = known.read_text()
        self._begun = False

    def metrics(self, row: dict[str, float]) -> None:
        """Adds a row to the log; `step` is one of its values."""
        if not self._begun:
            self._drop_rows_from(row["step"])
            self._begun = True
        with (self.folder / _LOG).open("a") as log:
            log.write(json.dumps(row) + "\n")
        with tracking.unless_unreachable():
            tracking.log_metrics(self._uri, self._run, row, int(row["step"]))

    def _drop_rows_from(self, step: float) -> None:
        """Leaves out what a training wrote that got further than its last checkpoint, and half a line at its end."""
        log = self.folder / _LOG
        if log.is_file():
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            write_text(log, "".join(line for line in lines if json.loads(line)["step"] < step))

    def picture(self, picture: Image, step: int) -> None:
        """Keeps a grid of samples."""
        path = self.folder / "samples" / f"{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        with tracking.unless_unreachable():
            tracking.log_artifact(self._uri, self._run, path, "samples")

    def end(self) -> None:
        """Closes the MLflow run."""
        with tracking.unless_unreachable():
            tracking.end_run(self._uri, self._run, {})


def _data(config: RendererConfig, folder: Path, rank: int, files: str) -> TrainingData:
    """Images and encoded captions, kept beside the checkpoints for the other workers and for a resumed training.

    Beside them lies how many images each source has, and how many were left out. The first worker makes them, and the
    others look for its file: at a barrier they would give up after half an hour, which large sources take. `files` is
    the state of the sources' files as the first worker sees it: copies on other machines may bear other times.
    """
    from kka_ray.features.text import TextEncoder
    from kka_ray.render.domain import LEAST
    from kka_ray.render.sources import read_sources
    from kka_ray.render.training import TrainingData

    made_of = config.model_dump(mode="json", include={"data", "sources", "network", "captions"})
    identity = json.dumps([made_of, config.training.seed, _DATA_FORMAT, files], sort_keys=True)
    while (found := TrainingData.load(folder / _DATA, identity)) is None and rank > 0:
        time.sleep(1)
    if found is not None:
        return found
    images, captions, counts = read_sources(config)
    if len(images) < LEAST:
        raise DataError(f"a renderer is trained on at least {LEAST} images, the sources hold {len(images)}")
    write_json(folder / _COUNTS, counts)
    data = TrainingData.encode(images, captions, TextEncoder(), config.network.max_text_tokens)
    data.save(folder / _DATA, identity)
    return data


def _card(config: RendererConfig, parameters: int, made_by: str) -> str:
    network, training = config.network, config.training
    way = "flow matching"
    if training.perceptual:
        way = "flow matching with a perceptual loss in EfficientNet-Lite0, on whose features it therefore fares best"
    if config.distil:
        way = (
            f"distillation: it draws in {config.distil.steps} evaluations what that draws in "
            f"{config.distil.steps * config.distil.substeps} steps with guidance {config.distil.guidance:g}"
        )
    return (
        f"# {config.name}\n\nA text-to-image diffusion transformer of {parameters / 1e6:.1f} M parameters, "
        f"{network.image_size} px in patches of {network.patch}, conditioned on MiniLM, trained from "
        f"{config.start or 'scratch'} by {way}.\n\n{config.card}\n"
        f"Trained for {training.steps} steps of {training.batch} images by {made_by}.\n"
    )
