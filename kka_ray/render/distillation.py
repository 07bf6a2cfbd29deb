"""Distillation of many guided steps into a few plain ones.

After Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), with guidance as in Meng
et al., "On Distillation of Guided Diffusion Models" (2023), in one stage instead of several. The states are those of
the teacher's own drawing, from noise on, and not noisy photographs: with guidance the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from kka_ray.render.pipeline import SHIFT, carried_on, guided, noise_levels
from kka_ray.render.transformer import FlowTransformer


@dataclass(frozen=True)
class Teacher:
    """A trained network whose drawing with guidance another learns to repeat in a few evaluations.

    Args:
        network: the teacher's.
        guidance: of its drawing.
        steps: of the student.
        substeps: of the teacher, for each of the student's.
    """

    network: FlowTransformer
    guidance: float
    steps: int
    substeps: int

    @torch.no_grad()
    def __call__(self, noise: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the student is to predict at the beginning of each of its steps, for texts (B, T, W) and their mask.

        noise: (B, 3, S, S). Returns, step after step, the states (steps * B, 3, S, S), their times (steps * B,) and the
        images of the same shape that lead from there, in one Euler step, to where the teacher is at the step's end.
        """
        sigmas = noise_levels(FlowMatchEulerDiscreteScheduler(shift=SHIFT), self.steps * self.substeps)
        state, before = noise, None
        states, times, images = [], [], []
        for step in range(self.steps):
            first, last = step * self.substeps, (step + 1) * self.substeps
            begin = state
            for i in range(first, last):
                clean = guided(self.network, state, 1 - sigmas[i], text, mask, self.guidance)
                towards, before = carried_on(clean, before, sigmas, i), clean
                state = _step(state, towards, sigmas[i + 1] / sigmas[i])
            kept = sigmas[last] / sigmas[first]
            states.append(begin)
            times.append(torch.full((len(noise),), 1 - sigmas[first], device=noise.device))
            images.append((state - kept * begin) / (1 - kept))
        return torch.cat(states), torch.cat(times), torch.cat(images)


def _step(state: Tensor, clean: Tensor, kept: float) -> Tensor:
    """The Euler step towards an image after which the share `kept` of the noise is left."""
    return kept * state + (1 - kept) * clean
