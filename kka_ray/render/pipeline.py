"""The built-in text-to-image pipeline: MiniLM token states, a flow transformer on pixels, few steps.

The flow runs from noise at time 0 to the image at time 1: `noisy = t * image + (1 - t) * noise`. The network predicts
the clean image; the scheduler, which counts in sigma = 1 - t, wants the derivative by sigma, `(noisy - clean) / sigma`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kka_ray.features.device import compute_dtype
from kka_ray.render.index import check_distilled
from kka_ray.render.transformer import FlowTransformer

if TYPE_CHECKING:
    from kka_ray.features.text import TextEncoder

STEPS, GUIDANCE = 20, 2.5
"""Of images that are drawn without saying how."""

SHIFT = 3.0
"""Of the scheduler that a trained network is saved with: with few steps more of them belong where there is much noise
(measured on 4 to 10)."""

TREND = 0.5
"""Share of the clean image's trend over the last step that the second-order sampler carries on. Guidance makes the
trend uneven: with 4 to 10 guided steps the images come closest to those of 40 steps with half of it."""


class KkaFlowPipeline(DiffusionPipeline):
    """Draws square images from texts; from a photograph and a text; or within a mask on a photograph.

    An image depends on its own prompt, generator and settings: noise comes from the picture's generator, prompts are
    encoded one by one and padded to one length. What else is in the batch can only change the rounding.

    Args:
        transformer: predicts the clean image.
        scheduler: takes the Euler steps. Its `shift` puts more of them where there is much noise.
        second_order: a step assumes that the clean image goes on changing as it did over the step before, not that it
            stays: 4 steps then come as near to many as 10 do otherwise.
        distilled_guidance, distilled_steps: the network has learnt to draw as another does with this guidance, and that
            in so many steps of one evaluation each. It draws so, from noise, and in no other way.
        text_encoder: reference of the MiniLM model (`kka_ray.assets`); it is loaded when first needed and is not
            saved with the pipeline.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(
        self,
        transformer: FlowTransformer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: str = "builtin:minilm-l6-v2",
        second_order: bool = False,
        distilled_guidance: float | None = None,
        distilled_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            text_encoder=text_encoder,
            second_order=second_order,
            distilled_guidance=distilled_guidance,
            distilled_steps=distilled_steps,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=transformer.config.patch)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=transformer.config.patch,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
            resample="nearest",
        )
        self.autocast_dtype: torch.dtype | None = None
        """What matrix products are computed in; None takes bfloat16 where the device has it, else float32. Weights in
        another type than float32 are computed with as they are, throughout: faster, and with more rounding."""
        self._encoder: TextEncoder | None = None

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return int(self.transformer.config.image_size)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = STEPS,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
        mask_image: PipelineImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws one image a prompt.

        Args:
            prompt: texts; tokens beyond the transformer's `max_text_tokens` are cut off.
            num_inference_steps: Euler steps from noise to image, at least 1; image-to-image takes the share `strength`.
            guidance_scale: classifier-free guidance; 1 switches it off and halves the work; None is `GUIDANCE`. A
                distilled network takes the steps and the guidance that it was distilled for; None is the latter.
            generator: one for all images or one an image.
            image: photographs to start from, one a prompt: PIL, or float arrays in [0, 1]; resized to `image_size`.
            strength: how much of a photograph is forgotten, in (0, 1]; the flow starts at time 1 - strength.
            mask_image: where the photographs may change (white), one a prompt; the rest is kept to the pixel.
            height, width: `image_size` or None, the network draws nothing else.
            output_type: `pil`; `np` for float32 (N, S, S, 3) in [0, 1]; `pt` for a tensor (N, 3, S, S).
            return_dict: False returns `(images,)`.

        Raises ValueError for arguments that do not fit each other, AssetError if the text encoder is missing.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._check(prompts, num_inference_steps, generator, image, strength, mask_image, (height, width))
        check_distilled(self.config, num_inference_steps, guidance_scale, edits=image is not None)
        guidance = GUIDANCE if guidance_scale is None else guidance_scale
        size, device = self.image_size, self._execution_device
        text, mask = self.encode(prompts)
        noise = randn_tensor((len(prompts), 3, size, size), generator=generator, device=device, dtype=torch.float32)

        photograph = mask_ = None
        start, steps = 1.0, num_inference_steps
        if image is not None:
            photograph = self._one_each(self.image_processor.preprocess(image, size, size), len(prompts), "image")
            start, steps = strength, max(1, round(strength * num_inference_steps))
        if mask_image is not None:
            mask_ = self._one_each(self.mask_processor.preprocess(mask_image, size, size), len(prompts), "mask_image")
        images = self._flow(text, mask, noise, photograph, mask_, start, steps, guidance)

        drawn = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=drawn) if return_dict else (drawn,)

    def _flow(
        self,
        text: Tensor,
        text_mask: Tensor,
        noise: Tensor,
        photograph: Tensor | None,
        mask: Tensor | None,
        start: float,
        steps: int,
        guidance: float,
    ) -> Tensor:
        """Steps from sigma = `start` to 0: images (N, 3, S, S) in float32."""
        device = noise.device
        sigmas = noise_levels(self.scheduler, steps, start, device)
        before: Tensor | None = None

        def known(sigma: float) -> Tensor:
            assert photograph is not None
            return (1 - sigma) * photograph + sigma * noise

        state = noise if photograph is None else known(sigmas[0])
        if self.config.distilled_steps is not None:
            guidance = 1.0
        weights = self.transformer.dtype
        text = text.to(weights)
        dtype = self.autocast_dtype or compute_dtype("auto", device)
        # One autocast for all steps: the weights are converted once.
        with torch.autocast(device.type, dtype, enabled=weights == torch.float32 != dtype):
            for i, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
                sigma = sigmas[i]
                clean = guided(self.transformer, state, 1 - sigma, text, text_mask, guidance)
                if self.config.second_order:
                    clean, before = carried_on(clean, before, sigmas, i), clean
                state = self.scheduler.step((state - clean) / sigma, timestep, state, return_dict=False)[0]
                if mask is not None:
                    state = torch.where(mask > 0.5, state, known(sigmas[i + 1]))
        return state

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token states (N, T, W) and their mask (N, T), bool; T is always the transformer's `max_text_tokens`."""
        if self._encoder is None:
            from kka_ray.features.text import TextEncoder

            self._encoder = TextEncoder(self.config.text_encoder, device=str(self._execution_device))
        config, device = self.transformer.config, self._execution_device
        text = torch.zeros(len(prompts), config.max_text_tokens, config.text_width, device=device)
        mask = torch.zeros(len(prompts), config.max_text_tokens, dtype=torch.bool, device=device)
        # One by one: in a batch the rounding of a text's states would depend on the texts beside it.
        encoded = {p: self._encoder.tokens([p], config.max_text_tokens) for p in dict.fromkeys(prompts)}
        for row, prompt in enumerate(prompts):
            states, present = encoded[prompt]
            text[row, : states.shape[1]] = states[0].to(device)
            mask[row, : states.shape[1]] = present[0].to(device)
        return text, mask

    def _one_each(self, images: Tensor, count: int, name: str) -> Tensor:
        if len(images) != count:
            raise ValueError(f"{name} holds {len(images)} images for {count} prompts; give one a prompt")
        # Arrays come with their channels last; the layout of memory would show in the rounding.
        return images.to(self._execution_device, torch.float32).contiguous()

    def _check(
        self,
        prompts: list[str],
        steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        image: PipelineImageInput | None,
        strength: float,
        mask_image: PipelineImageInput | None,
        size: tuple[int | None, int | None],
    ) -> None:
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompt must be a text or a list of texts, got {prompts!r}")
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        if isinstance(generator, list) and len(generator) != len(prompts):
            raise ValueError(f"{len(generator)} generators for {len(prompts)} prompts; give one a prompt")
        if not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {strength}")
        if mask_image is not None and image is None:
            raise ValueError("mask_image needs image: the photograph that is kept outside the mask")
        if any(side not in (None, self.image_size) for side in size):
            raise ValueError(f"this pipeline draws {self.image_size} x {self.image_size} px only, got {size}")


def noise_levels(
    scheduler: FlowMatchEulerDiscreteScheduler, steps: int, start: float = 1.0, device: torch.device | None = None
) -> list[float]:
    """Sets the scheduler to so many steps; their sigmas from `start` to 0, one more than there are steps."""
    shift = scheduler.config.shift
    # The scheduler shifts what it is given; the first sigma is to be `start` all the same.
    first = start / (shift - (shift - 1) * start)
    scheduler.set_timesteps(sigmas=np.linspace(first, first / steps, steps).tolist(), device=device)
    return list(scheduler.sigmas.tolist())


def guided(network: FlowTransformer, state: Tensor, time: float, text: Tensor, mask: Tensor, guidance: float) -> Tensor:
    """Clean images predicted with classifier-free guidance: (N, 3, S, S) in float32; 1 takes half the work.

    state: (N, 3, S, S) at `time`; text: token states (N, T, W) with their mask (N, T).
    """
    state = state.to(network.dtype)
    if guidance == 1:
        return network(state, torch.full((len(state),), time, device=state.device), text, mask).float()
    # The rows without text follow those with it, in one batch.
    at = torch.full((2 * len(state),), time, device=state.device)
    both = torch.cat([mask, torch.zeros_like(mask)])
    clean = network(torch.cat([state, state]), at, torch.cat([text, text]), both)
    with_text, without = clean.float().chunk(2)
    return without + guidance * (with_text - without)


def carried_on(clean: Tensor, before: Tensor | None, sigmas: list[float], i: int) -> Tensor:
    """The constant clean image whose Euler step equals the exact step with one that changes linearly in sigma.

    `before` is the clean image at the step before; the change since then goes on by the share `TREND`.
    """
    if before is None:
        return clean
    here, there = sigmas[i], sigmas[i + 1]
    slope = TREND * (clean - before) / (here - sigmas[i - 1])
    # With d(x / sigma) / d(sigma) = -clean / sigma^2 integrated from here to there.
    mean = there * math.log(there / here) / (1 - there / here) if there else 0.0
    return clean - slope * (here + mean)


# diffusers looks the class that a folder's model_index.json names up in its own module.
setattr(diffusers, KkaFlowPipeline.__name__, KkaFlowPipeline)
