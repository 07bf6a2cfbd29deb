"""Distillation of many guided steps into a few plain ones.

After Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), with guidance as in Meng
et al., "On Distillation of Guided Diffusion Models" (2023), in one stage instead of several. The states are those of
the teacher's own drawing, from noise on, and not noisy photographs: with guidance the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kka_ray.render.pipeline import SHIFT, carried_on
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
        sigmas = schedule(self.steps * self.substeps)
        state, before = noise, None
        states, times, images = [], [], []
        for step in range(self.steps):
            first, last = step * self.substeps, (step + 1) * self.substeps
            begin = state
            for i in range(first, last):
                clean = self._guided(state, 1 - sigmas[i], text, mask)
                towards, before = carried_on(clean, before, sigmas, i), clean
                state = _step(state, towards, sigmas[i + 1] / sigmas[i])
            kept = sigmas[last] / sigmas[first]
            states.append(begin)
            times.append(torch.full((len(noise),), 1 - sigmas[first], device=noise.device))
            images.append((state - kept * begin) / (1 - kept))
        return torch.cat(states), torch.cat(times), torch.cat(images)

    def _guided(self, state: Tensor, time: float, text: Tensor, mask: Tensor) -> Tensor:
        both = torch.cat([mask, torch.zeros_like(mask)])
        at = torch.full((2 * len(state),), time, device=state.device)
        clean = self.network(torch.cat([state, state]), at, torch.cat([text, text]), both)
        with_text, without = clean.float().chunk(2)
        return without + self.guidance * (with_text - without)


def schedule(steps: int) -> list[float]:
    """Noise levels sigma, from 1 to 0, of the pipeline's drawing in so many steps."""
    return [SHIFT * u / (1 + (SHIFT - 1) * u) for u in torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()]


def _step(state: Tensor, clean: Tensor, kept: float) -> Tensor:
    """The Euler step towards an image after which the share `kept` of the noise is left."""
    return kept * state + (1 - kept) * clean
