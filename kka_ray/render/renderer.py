"""Draws texts with any diffusers text-to-image pipeline, a picture a text, and isolates what fails."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from kka_ray import assets
from kka_ray.config.models import RenderConfig
from kka_ray.errors import AssetError, ConfigError, ResourceError
from kka_ray.features.device import compute_dtype
from kka_ray.render.index import BUILT_IN, check_index, model_index
from kka_ray.render.masks import blob_mask
from kka_ray.render.pipeline import KkaFlowPipeline

log = logging.getLogger(__name__)

VERSION = 8
"""Goes into the store's keys; raised when drawing changes."""


@dataclass(frozen=True)
class DrawError:
    """Why a text was not drawn."""

    reason: str


class Renderer:
    """A pipeline that is loaded and ready to draw, made by `load`.

    Attributes:
        size: (height, width) of what is drawn, in pixels; None where only the pipeline knows.
    """

    def __init__(self, pipeline: Any, config: RenderConfig, device: str, size: tuple[int, int] | None) -> None:
        self.config = config
        self.size = size
        self._pipeline = pipeline
        self._device = device

    @classmethod
    def load(cls, config: RenderConfig, device: str = "cpu", threads: int = 1) -> Renderer:
        """Loads `config.pipeline` from safetensors onto `device`; torch then computes with `threads` threads.

        Raises AssetError if the pipeline is missing or unreadable, ConfigError if it cannot do what is configured.
        """
        torch.set_num_threads(threads)
        model = assets.resolve(config.pipeline)
        index = model_index(config.pipeline, model.path)
        check_index(config, index)
        built_in = index["_class_name"] == BUILT_IN
        dtype = compute_dtype(config.dtype, torch.device(device))
        with _no_progress_bars():
            # The built-in network keeps its weights in float32 and computes in `dtype` by autocast: guidance makes much
            # of rounding. One that was distilled has none to compute.
            by_autocast = built_in and not index.get("distilled_steps")
            pipeline = _load(config, model.path, index, torch.float32 if by_autocast else dtype)
            pipeline = _for_mode(pipeline, config)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        # Autoencoders that cannot have the method as well, and raise.
        if hasattr(getattr(pipeline, "vae", None), "use_slicing"):
            pipeline.vae.enable_slicing()  # one image at a time: at 1024 px the decoder takes gigabytes for each
        if built_in:
            pipeline.autocast_dtype = dtype
        renderer = cls(pipeline, config, device, _size(pipeline, config))
        renderer._check_arguments()
        return renderer

    def draw(
        self, texts: Sequence[str], seeds: Sequence[int], normals: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray | DrawError]:
        """A picture a text, uint8 (H, W, 3) in RGB, or why there is none, in the order of `texts`.

        Each picture draws on its own seed. `normals`, in mode img2img, are the photographs that are edited, uint8
        (H, W, 3) of any sizes, one a text; a drawn picture has the renderer's size. With a mask, every pixel outside it
        is the (resized) photograph's. At most `config.chunk` pictures are drawn at once; the same call with the same
        thread count repeats bit for bit.

        A text on which the pipeline raises is found by halving and does not touch its neighbours. A picture that is
        not finite, or of one colour (which is what safety checkers leave), is an error as well. Where the memory does
        not suffice for a chunk, it is halved, too. Raises ValueError for arguments of unequal length, ResourceError if
        the memory does not suffice for one picture.
        """
        if len(seeds) != len(texts) or (normals is not None and len(normals) != len(texts)):
            raise ValueError(f"{len(texts)} texts need as many seeds ({len(seeds)}) and normals")
        if (normals is None) != (self.config.mode == "text2img"):
            raise ValueError("mode img2img needs one normal image a text, and mode text2img takes none")
        drawn: list[np.ndarray | DrawError] = []
        for start in range(0, len(texts), self.config.chunk):
            part = slice(start, start + self.config.chunk)
            drawn += self._isolate(texts[part], seeds[part], None if normals is None else normals[part])
        return drawn

    def _isolate(
        self, texts: Sequence[str], seeds: Sequence[int], normals: Sequence[np.ndarray] | None
    ) -> list[np.ndarray | DrawError]:
        try:
            return self._draw(texts, seeds, normals)
        except ConfigError:
            raise  # of no text in particular
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise  # the device is lost to this process, for every text
            scarce = _is_out_of_memory(error)
            if len(texts) == 1:
                if scarce:
                    raise ResourceError(f"not enough memory on {self._device} to draw a picture ({error})") from error
                return [DrawError(f"{type(error).__name__}: {error}")]
            if scarce:
                log.warning(
                    "not enough memory on %s to draw %d pictures at once (%s): half of them at a time; lower "
                    "render.chunk = %d to spare the trial",
                    *(self._device, len(texts), error, self.config.chunk),
                )
        middle = len(texts) // 2
        halves = [slice(0, middle), slice(middle, None)]
        return [
            row
            for half in halves
            for row in self._isolate(texts[half], seeds[half], None if normals is None else normals[half])
        ]

    def _draw(
        self, texts: Sequence[str], seeds: Sequence[int], normals: Sequence[np.ndarray] | None
    ) -> list[np.ndarray | DrawError]:
        arguments: dict[str, Any] = {
            "prompt": list(texts),
            # Generators on the CPU give the same noise whatever the device.
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            **self._fixed_arguments(),
        }
        photographs: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        if normals is not None:
            assert self.size is not None
            height, width = self.size
            photographs = [_resize(normal, height, width) for normal in normals]
            arguments["image"] = [Image.fromarray(p) for p in photographs]
        if normals is not None and self.config.mask is not None:
            low, high = self.config.mask.min_area, self.config.mask.max_area
            masks = [blob_mask(height, width, seed, low, high) for seed in seeds]
            arguments["mask_image"] = [Image.fromarray(m.astype(np.uint8) * 255) for m in masks]
        if self._guides_by_prompts():
            arguments["negative_prompt"] = [" "] * len(texts)  # as its authors call it; none would switch guidance off
        with torch.inference_mode():
            images = np.asarray(self._pipeline(**arguments).images)
        if self.size not in (None, images.shape[1:3]):
            # Some pipelines round a size to what they can draw, with no more than a warning.
            raise ConfigError(
                f"{self.config.pipeline} draws {images.shape[2]} x {images.shape[1]} px where {self.size[1]} x "
                f"{self.size[0]} were asked for; set render.width and render.height to what it can draw"
            )
        rows = [_finish(image) for image in images]
        for i, mask in enumerate(masks):
            row = rows[i]
            if isinstance(row, np.ndarray):
                # Latent pipelines change the rest of the photograph as well, if only by encoding and decoding it.
                rows[i] = np.where(mask[..., None], row, photographs[i])
        return rows

    def _fixed_arguments(self) -> dict[str, Any]:
        config, accepted = self.config, inspect.signature(self._pipeline.__call__).parameters
        arguments: dict[str, Any] = {"num_inference_steps": config.steps, "output_type": "np"}
        if config.guidance is not None:
            arguments["true_cfg_scale" if self._guides_by_prompts() else "guidance_scale"] = config.guidance
        if config.mode == "img2img":
            arguments["strength"] = config.strength
        if self.size is not None:
            # Image-to-image pipelines that take no size draw at the photograph's, which has been resized.
            sides = dict(zip(("height", "width"), self.size, strict=True))
            needed = config.mode == "text2img"
            arguments |= {name: side for name, side in sides.items() if needed or name in accepted}
        return arguments

    def _guides_by_prompts(self) -> bool:
        """Whether guidance is `true_cfg_scale` and wants a negative prompt, as Qwen-Image's, which ignores
        `guidance_scale` unless its network was distilled to read it. FLUX has both names, the former for experts."""
        scale = inspect.signature(self._pipeline.__call__).parameters.get("true_cfg_scale")
        network = getattr(getattr(self._pipeline, "transformer", None), "config", None)
        reads_scale = getattr(network, "guidance_embeds", False)
        return self.config.guidance is not None and scale is not None and scale.default > 1 and not reads_scale

    def _check_arguments(self) -> None:
        accepted = inspect.signature(self._pipeline.__call__).parameters
        needed = {"prompt", "generator", *self._fixed_arguments()}
        needed |= {"image"} if self.config.mode == "img2img" else set()
        needed |= {"mask_image"} if self.config.mask is not None else set()
        missing = sorted(needed - set(accepted))
        given_by_us = needed | {"self"}
        unknown = [
            name
            for name, parameter in accepted.items()
            if parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and name not in given_by_us
        ]
        if missing or unknown:
            what = f"takes no {', '.join(missing)}" if missing else f"also needs {', '.join(unknown)}"
            hint = "; set render.guidance=null" if "guidance_scale" in missing else ""
            raise ConfigError(
                f"{self.config.pipeline} ({type(self._pipeline).__name__}) cannot draw in mode {self.config.mode}: it "
                f"{what}{hint}"
            )


def _load(config: RenderConfig, folder: Path, index: dict[str, Any], dtype: torch.dtype) -> Any:
    # A component that was saved as none (a safety checker, SD3's T5) must be passed as none to be left out.
    left_out: dict[str, Any] = {name: None for name, value in index.items() if value == [None, None]}
    try:
        return DiffusionPipeline.from_pretrained(
            str(folder),
            dtype=dtype,
            variant=assets.variant(file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            **left_out,
        )
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise AssetError(
            f"{config.pipeline} cannot be loaded as a diffusers pipeline with safetensors weights: {error}"
        ) from error


def _for_mode(pipeline: Any, config: RenderConfig) -> Any:
    """The pipeline of the same weights that does what the mode asks for."""
    if config.mode == "text2img" or isinstance(pipeline, KkaFlowPipeline):
        return pipeline
    auto = AutoPipelineForInpainting if config.mask is not None else AutoPipelineForImage2Image
    try:
        return auto.from_pipe(pipeline)
    except ValueError as error:
        what = "mode img2img" + (" with a mask" if config.mask is not None else "")
        raise ConfigError(
            f"{config.pipeline} ({type(pipeline).__name__}) has no pipeline for {what}: {error}"
        ) from error


def _size(pipeline: Any, config: RenderConfig) -> tuple[int, int] | None:
    """(height, width) to ask for: the configured one, else in mode img2img the pipeline's own, else None."""
    own = _own_side(pipeline)
    if isinstance(pipeline, KkaFlowPipeline) and any(side not in (None, own) for side in (config.height, config.width)):
        raise ConfigError(
            f"{config.pipeline} draws {own} x {own} px only; leave render.width and render.height out "
            f"(got {config.width} x {config.height})"
        )
    height, width = config.height or config.width or own, config.width or config.height or own
    if config.mode == "text2img" and config.height is None and config.width is None:
        return None
    if height is None or width is None:
        raise ConfigError(f"{config.pipeline} does not say what size it draws; set render.width and render.height")
    return height, width


def _own_side(pipeline: Any) -> int | None:
    if isinstance(pipeline, KkaFlowPipeline):
        return pipeline.image_size
    scale = getattr(pipeline, "vae_scale_factor", 1)
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    side = getattr(getattr(network, "config", None), "sample_size", None)
    side = side or getattr(pipeline, "default_sample_size", None)
    return side * scale if isinstance(side, int) else None


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"normal images must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _finish(image: np.ndarray) -> np.ndarray | DrawError:
    """A float image (H, W, 3) in [0, 1] as uint8, or what is wrong with it."""
    if not np.isfinite(image).all():
        return DrawError("the picture is not finite; half precision may have overflowed: try render.dtype=float32")
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    if not np.ptp(pixels, axis=(0, 1)).any():
        colour = tuple(pixels[0, 0].tolist())
        return DrawError(f"the picture is of one colour, RGB {colour}: a safety checker, or numbers that overflowed")
    return pixels


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
