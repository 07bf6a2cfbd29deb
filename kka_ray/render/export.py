"""Writes a trained network as a diffusers folder, as small as it can be shipped."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import make_image_grid
from PIL import Image

from kka_ray.errors import AssetError
from kka_ray.render.distillation import Teacher
from kka_ray.render.pipeline import GUIDANCE, SHIFT, STEPS, KkaFlowPipeline
from kka_ray.render.transformer import FlowTransformer

SAMPLES = 8
"""Pictures of a text in a grid of samples."""
MAX_BYTES = 25 * 2**20
"""What a folder of shipped weights may hold at most."""


def draw_samples(network: FlowTransformer, texts: Sequence[str], teacher: Teacher | None = None) -> Image.Image:
    """A grid with a row a text: `SAMPLES` pictures drawn by the network with the pipeline's defaults, or as its teacher
    would have it, always on the same seeds."""
    pipeline = _pipeline(network, teacher)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for _ in texts for seed in range(SAMPLES)]
    rows = [text for text in texts for _ in range(SAMPLES)]
    steps, guidance = (teacher.steps, teacher.guidance) if teacher else (STEPS, GUIDANCE)
    (pictures,) = pipeline(rows, steps, guidance, generator=seeds, return_dict=False)
    return make_image_grid(pictures, rows=len(texts), cols=SAMPLES)


def export_pipeline(average: FlowTransformer, target: Path, card: str, teacher: Teacher | None = None) -> Path:
    """Writes `target` as a diffusers pipeline in float16 safetensors, with `card` as its README.md.

    `average` (the averaged network of a training) stays as it is; `teacher` is what it was distilled from, if it was.
    Whatever was in `target` is replaced. Raises AssetError, leaving nothing behind, if the folder would exceed
    `MAX_BYTES`.
    """
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    halved = copy.deepcopy(average).cpu().half()
    _pipeline(halved, teacher).save_pretrained(partial, safe_serialization=True)
    _forget_folder(partial / "transformer" / "config.json")
    (partial / "README.md").write_text(card)
    size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    if size > MAX_BYTES:
        shutil.rmtree(partial)
        raise AssetError(
            f"{target} would hold {size / 2**20:.1f} MiB, more than the {MAX_BYTES / 2**20:.0f} MiB that shipped "
            "weights may take; train a narrower or shallower network, or save it with KkaFlowPipeline.save_pretrained"
        )
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return target


def _forget_folder(config: Path) -> None:
    """Takes out of a saved network's configuration the folder that it was once loaded from."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _pipeline(network: FlowTransformer, teacher: Teacher | None) -> KkaFlowPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    if teacher is None:
        return KkaFlowPipeline(network, scheduler, second_order=True)
    # The teacher's second order is in what the student has learnt.
    return KkaFlowPipeline(network, scheduler, distilled_guidance=teacher.guidance, distilled_steps=teacher.steps)
