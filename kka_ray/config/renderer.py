"""How a built-in renderer is trained."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kka_ray.config.models import ClusterConfig, Data, FlowersData, Strict, TrackingConfig
from kka_ray.config.strict import NAME


class FlowersSource(Strict):
    """Procedurally drawn flowers of the demo domain, none with a held-out combination of attributes."""

    kind: Literal["flowers"]
    count: int = Field(40_000, ge=1)
    seed: int = Field(0, ge=0)


class HeldOut(Strict):
    """Of the normal class of an evaluation, only images that it trains on for every one of the seeds are shown; of any
    class, no copy of an image that it validates or tests on."""

    data: Data = Field(description="its path is the source's")
    seeds: int = Field(5, ge=1, description="seeds 0 to N - 1")


class ParquetSource(Strict):
    """Train rows of a Parquet set, with captions from people, or from the class names, and from what is measured."""

    kind: Literal["parquet"]
    path: str = Field(description="folder with train-*.parquet, as seen from the training's `data`")
    style: str = Field("", description="words that half of the captions end with, as in 'seen from above'")
    without_superclasses: tuple[str, ...] = Field((), description="whole superclasses that are never shown")
    without_classes: tuple[str, ...] = Field((), description="whole classes that are never shown")
    held_out: HeldOut | None = Field(None, description="the evaluation whose validation and test images are not shown")


class DataSource(Strict):
    """The training normals of a data set as a run reads it, with their captions and what is measured."""

    kind: Literal["data"]
    data: Data = Field(description="as in a run; a relative path begins in the training's `data`")
    seed: int = Field(0, ge=0, description="of the split: that of the run whose validation normals are not shown")
    style: str = Field("", description="words that half of the captions end with, as in 'seen from above'")


Source = Annotated[FlowersSource | ParquetSource | DataSource, Field(discriminator="kind")]


class NetworkConfig(Strict):
    """Size of the network; see `kka_ray.render.transformer.FlowTransformer`."""

    image_size: int = Field(64, ge=8, description="pixels; images are resized to this square")
    patch: int = Field(8, ge=1)
    width: int = Field(256, ge=16)
    depth: int = Field(6, ge=1)
    heads: int = Field(4, ge=1)
    max_text_tokens: int = Field(32, ge=4)
    word_slots: int = Field(8, ge=1)
    overlap: int = Field(0, ge=0, description="pixels by which a token reaches into the patches around its own")


class PerceptualConfig(Strict):
    """Comparison of predicted and true images in the maps of EfficientNet-Lite0, beside that of their pixels."""

    weight: float = Field(0.1, gt=0, description="of the distance of the maps, beside the flow's loss")
    image_size: int = Field(96, ge=32, description="side to which images are resized for the backbone, in pixels")
    from_time: float = Field(0.3, ge=0, lt=1, description="noisier images than of this time are not compared; 0: none")


class TrainingConfig(Strict):
    """Muon for the blocks' matrices and AdamW for the rest, with a warm-up and a linear final decay; an average of the
    weights is what is kept."""

    steps: int = Field(ge=1)
    batch: int = Field(128, ge=1, description="images a step, over all workers")
    learning_rate: float = Field(8e-4, gt=0, description="of AdamW")
    matrix_rate: float = Field(0.02, gt=0, description="of Muon")
    warmup: int = Field(100, ge=0)
    decay_from: float = Field(0.7, gt=0, le=1)
    drop_text: float = Field(0.1, ge=0, lt=1)
    perceptual: PerceptualConfig | None = Field(None, description="by default images are compared by pixels alone")
    ema: float = Field(0.998, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    checkpoint_every: int = Field(200, ge=1)


class DistilConfig(Strict):
    """Distillation of many guided steps, of two evaluations each, into a few of one."""

    guidance: float = Field(2.5, ge=1, description="with which `start` draws, and the student then as if")
    steps: int = Field(3, ge=1, description="in which the student draws")
    substeps: int = Field(4, ge=1, description="steps of `start` for each of them")


class RendererConfig(Strict):
    """A training of the built-in text-to-image network."""

    name: str = Field(pattern=NAME)
    output: str = Field("renderers", description="folder of the trainings; this one's is OUTPUT/NAME")
    data: str = Field(".", description="folder in which the sources' paths begin")
    sources: tuple[Source, ...] = Field(min_length=1)
    network: NetworkConfig = NetworkConfig()
    start: str | None = Field(
        None, description="renderer whose weights a new training begins with: builtin: or a folder; by default random"
    )
    distil: DistilConfig | None = Field(None, description="learn to draw in a few steps what `start` draws in many")
    training: TrainingConfig
    captions: int = Field(1, ge=1, description="captions made for each photograph; each step draws one")
    samples: tuple[str, ...] = Field((), description="texts that are drawn as the training goes on, to look at")
    samples_every: int = Field(1000, ge=1, description="steps from one grid of samples to the next")
    card: str = Field("", description="what the model card says of the data, its terms and what cannot be drawn")
    workers: int = Field(1, ge=1, description="training processes; they share each batch")
    processes: int = Field(2, ge=1, description="processes that draw procedural images")
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig(experiment="kka-renderers")

    @model_validator(mode="after")
    def _folder_of_images_is_named(self) -> RendererConfig:
        sources = [s.data if isinstance(s, DataSource) else s for s in self.sources]
        paths = [s.path for s in sources if not isinstance(s, FlowersSource | FlowersData)]
        # Whoever leaves it out need not know that it would be whatever folder the command is given in.
        if "data" not in self.model_fields_set and any(PurePath(path) == PurePath() for path in paths):
            raise ValueError(
                "data: is required, as a source is that folder itself; give the folder of images as -o data=DIR, or "
                "the current one as -o data=."
            )
        return self

    @model_validator(mode="after")
    def _batch_is_shared_out(self) -> RendererConfig:
        if self.training.batch % self.workers:
            raise ValueError(f"training.batch ({self.training.batch}) must be a multiple of workers ({self.workers})")
        return self

    @model_validator(mode="after")
    def _workers_have_whole_gpus(self) -> RendererConfig:
        self.cluster.refuse_shared_gpus(self.workers, "workers", "workers")
        return self

    @model_validator(mode="after")
    def _a_teacher_is_there(self) -> RendererConfig:
        if self.distil is not None and self.start is None:
            raise ValueError("distil needs a renderer to learn from: set start")
        return self
