"""A pipeline's `model_index.json`: its class, and how a distilled one draws. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kka_ray import assets
from kka_ray.config.models import RenderConfig
from kka_ray.errors import AssetError, ConfigError

BUILT_IN = "KkaFlowPipeline"
"""The class of pipelines that `kka renderer train` makes."""


def check_renderer(config: RenderConfig) -> None:
    """Raises ConfigError if the pipeline is on this machine and was distilled to draw otherwise than is configured.

    It is loaded, and then refused for the same reason, only when a run has begun. Raises AssetError if it is no
    pipeline.
    """
    folder = assets.here(config.pipeline)
    if folder is not None:
        check_index(config, model_index(config.pipeline, folder))


def check_index(config: RenderConfig, index: Mapping[str, Any]) -> None:
    """As `check_renderer`, of an index that was read."""
    if index["_class_name"] != BUILT_IN:
        return
    try:
        check_distilled(index, config.steps, config.guidance, edits=config.mode == "img2img")
    except ValueError as error:
        raise ConfigError(f"{config.pipeline}: {error}; see render.steps, render.guidance, render.mode") from error


def check_distilled(made: Mapping[str, Any], steps: int, guidance: float | None, *, edits: bool) -> None:
    """Raises ValueError if a network was distilled to draw otherwise; guidance None is whatever it draws with.

    made: the pipeline's configuration, as its index has it.
    """
    wanted = made.get("distilled_steps"), made.get("distilled_guidance")
    if wanted == (None, None):
        return
    if None in wanted:
        raise ValueError("of distilled_steps and distilled_guidance the pipeline has one: distil the network anew")
    if edits:
        raise ValueError("a distilled network draws from noise alone and edits no photographs: take its teacher")
    if wanted != (steps, wanted[1] if guidance is None else guidance):
        raise ValueError(
            f"this network was distilled to draw in {wanted[0]} steps with guidance {wanted[1]:g}, not in {steps} "
            f"steps with guidance {guidance}"
        )


def pipeline_identity(reference: str) -> str:
    """Changes with the weights of a pipeline, those of the text encoder that a built-in one names included.

    Raises AssetError if either is missing.
    """
    model = assets.resolve(reference)
    config = model.path / "model_index.json"
    encoder = json.loads(config.read_text()).get("text_encoder") if config.is_file() else None
    # Other pipelines hold their text encoder, and name its class here.
    return f"{model.identity}/{assets.resolve(encoder).identity}" if isinstance(encoder, str) else model.identity


def model_index(reference: str, folder: Path) -> dict[str, Any]:
    """The index of a pipeline in `folder`. Raises AssetError, naming the `reference`, if it has none."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise AssetError(f"{reference} is no diffusers pipeline: no readable model_index.json in {folder}") from error
    if "_class_name" not in index:
        raise AssetError(f"{reference} is no diffusers pipeline: its model_index.json names no _class_name")
    return dict(index)
