"""Training of the built-in text-to-image network by flow matching, in plain torch."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kka_ray.encoders.state import optimizer_state, part, restore_optimizer
from kka_ray.errors import ConfigError
from kka_ray.features.text import TextEncoder
from kka_ray.files import written
from kka_ray.render.distillation import Teacher
from kka_ray.render.perceptual import Perceptual
from kka_ray.render.transformer import FlowTransformer

CHECKPOINT = "training.safetensors"
"""Name of the file with a training's state."""


@dataclass(frozen=True)
class TrainingData:
    """Images uint8 (N, S, S, 3), each with K captions, and the token states of all captions.

    `captions` (N, K) holds rows of `starts` and `lengths` (U,), which say where among the `states` (M, D), float16, the
    tokens of a caption lie. Captions are stored end to end: padded, they would take twice the memory.
    """

    images: np.ndarray
    captions: Tensor
    states: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def encode(
        cls, images: np.ndarray, captions: Sequence[Sequence[str]], encoder: TextEncoder, max_tokens: int
    ) -> TrainingData:
        """Encodes each caption once; `captions` has the same number for each image."""
        unique = sorted({text for row in captions for text in row}, key=lambda text: (len(text), text))
        parts, lengths = [], []
        for start in range(0, len(unique), 256):
            states, present = encoder.tokens(unique[start : start + 256], max_tokens)
            parts.append(states[present].half())
            lengths.append(present.sum(1))
        number = {caption: i for i, caption in enumerate(unique)}
        length = torch.cat(lengths)
        numbers = torch.tensor([[number[text] for text in row] for row in captions])
        return cls(images, numbers, torch.cat(parts), length.cumsum(0) - length, length)

    def text(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Token states (B, T, D), float32, of captions by number (B,), and their mask (B, T); T is the longest's."""
        lengths = self.lengths[captions][:, None]
        place = torch.arange(int(lengths.max()))
        mask = place < lengths
        rows = (self.starts[captions][:, None] + place).clamp_max(len(self.states) - 1)
        return self.states[rows].float() * mask[..., None], mask

    def identity(self) -> str:
        """SHA-256 of the images and of their captions, which are known by the state of their first token."""
        digest = hashlib.sha256()
        states = self.states[self.starts].numpy()
        for content in (self.images, self.captions.numpy(), self.lengths.numpy(), states):
            digest.update(str(content.shape).encode())
            digest.update(np.ascontiguousarray(content).data)
        return digest.hexdigest()

    def save(self, file: Path, identity: str) -> None:
        """Writes everything as safetensors, whole or not at all. `identity` says what it was made of."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors["images"] = torch.from_numpy(self.images)
        with written(file) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"identity": identity})

    @classmethod
    def load(cls, file: Path, identity: str) -> TrainingData | None:
        """What `save` wrote with this identity, mapped into memory; None if there is none."""
        if not file.is_file():
            return None
        with safe_open(file, "pt") as content:
            if content.metadata().get("identity") != identity:
                return None
        tensors = load_file(file)
        return cls(tensors.pop("images").numpy(), **tensors)


@dataclass(frozen=True)
class Settings:
    """How to train: Muon and AdamW, warm-up and linear final decay, an average of the weights, captions dropped.

    Muon (Jordan et al., 2024) takes the matrices of the blocks, AdamW everything else. The network then learns
    from far fewer images than with AdamW alone.
    """

    steps: int
    batch: int = 128
    learning_rate: float = 8e-4
    """Of AdamW."""
    matrix_rate: float = 0.02
    """Of Muon; the warm-up and the decay are the same."""
    warmup: int = 200
    decay_from: float = 0.7
    """Share of the steps after which the learning rate falls linearly to a hundredth."""
    drop_text: float = 0.1
    ema: float = 0.999
    seed: int = 0
    checkpoint_every: int = 500


def rate_factor(step: int, settings: Settings) -> float:
    """What both learning rates are multiplied with at a step: warm-up, plateau, linear decay to a hundredth."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    start = settings.decay_from * settings.steps
    if step < start:
        return 1.0
    return 1 - 0.99 * (step - start) / max(settings.steps - start, 1)


def flow_loss(
    network: torch.nn.Module,
    images: Tensor,
    text: Tensor,
    mask: Tensor,
    generator: torch.Generator,
    teacher: Teacher | None = None,
    perceptual: Perceptual | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean squared error of the velocity, times drawn from a logit-normal, and the weighted perceptual distance.

    images: (B, 3, S, S) in [-1, 1]. With a teacher the states of its drawing of the texts are in the place of noisy
    images. Without `perceptual` its distance is 0. Noise and times are drawn on the CPU, wherever the network is.
    """
    device = next(network.parameters()).device
    noise = torch.randn(images.shape, generator=generator)
    text, mask = text.to(device), mask.to(device)
    if teacher:
        noisy, time_, images = teacher(noise.to(device), text, mask)
        text, mask = text.repeat(teacher.steps, 1, 1), mask.repeat(teacher.steps, 1)
    else:
        time_ = torch.sigmoid(torch.randn(len(images), generator=generator) - 0.4)
        at = time_[:, None, None, None]
        noisy, images, time_ = (x.to(device) for x in (at * images + (1 - at) * noise, images, time_))
    clean = network(noisy, time_, text, mask)
    # The velocity is (clean - noisy) / (1 - t); the floor keeps the last steps from ruling the loss.
    left = (1 - time_[:, None, None, None]).clamp_min(0.05)
    flow = (((clean.float() - images) / left) ** 2).mean()
    return flow, perceptual(clean, images, time_) if perceptual else torch.zeros_like(flow)


def check_checkpoint(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raises ConfigError if the checkpoint in a folder is of a training with another identity, by name a JSON value.

    Names that only one of the two has are not compared: another version may have written it.
    """
    with safe_open(folder / CHECKPOINT, "pt") as content:
        stored = json.loads((content.metadata() or {}).get("identity", "{}"))
    differing = sorted(name for name in stored.keys() & identity.keys() if stored[name] != identity[name])
    if differing:
        plain = lambda value: isinstance(value, int | float)  # noqa: E731
        said = [
            f"{n} was {stored[n]} and is {identity[n]}" if plain(stored[n]) and plain(identity[n]) else f"{n} differs"
            for n in differing
        ]
        raise ConfigError(
            f"the checkpoint in {folder} is of another training: {', '.join(said)}. Give it the values that it began "
            "with, or train under another name; with `start` a training begins with the weights of another"
        )


class Trainer:
    """One rank's training state. Every step draws its batch, noise and times from the seed and the step's number, so
    that a run resumed from a checkpoint repeats the uninterrupted one. `identity` is kept in the checkpoints and says
    which training they are of (see `check_checkpoint`)."""

    def __init__(
        self,
        network: FlowTransformer,
        settings: Settings,
        rank: int = 0,
        world: int = 1,
        identity: Mapping[str, Any] | None = None,
        teacher: Teacher | None = None,
        perceptual: Perceptual | None = None,
    ) -> None:
        self.network, self.settings, self.rank, self.world = network, settings, rank, world
        self.teacher, self.perceptual = teacher, perceptual
        self.identity = dict(identity or {})
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        matrices = [p for p in network.blocks.parameters() if p.ndim == 2]
        taken = {id(p) for p in matrices}
        rest = [p for p in network.parameters() if id(p) not in taken]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=settings.matrix_rate, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self._rates = (settings.matrix_rate, settings.learning_rate)
        self.step = 0

    def train_step(self, data: TrainingData, forward: torch.nn.Module | None = None) -> dict[str, float]:
        """One optimiser step on this rank's share of the batch.

        Returns the flow's `loss` and, if there is one, the weighted `perceptual` distance that was added to it.

        `forward` is the network as wrapped for data-parallel training, by default the network itself.
        """
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        rows = torch.randint(len(data.images), (settings.batch,), generator=generator)
        flip = torch.rand(settings.batch, generator=generator) < 0.5
        keep = torch.rand(settings.batch, generator=generator) >= settings.drop_text
        said = torch.randint(data.captions.shape[1], (settings.batch,), generator=generator)
        share = slice(self.rank, None, self.world)
        rows, flip, keep, said = rows[share], flip[share], keep[share], said[share]
        generator.manual_seed(settings.seed * 1_000_003 + self.step * self.world + self.rank + 500_000_000)

        images = torch.from_numpy(data.images[rows.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        text, mask = data.text(data.captions[rows, said])
        mask = mask & keep[:, None]
        factor = rate_factor(self.step, settings)
        for optimizer, rate in zip(self.optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        with torch.autocast(self.network.device.type, torch.bfloat16):
            flow, distance = flow_loss(
                self.network if forward is None else forward,
                images,
                text,
                mask,
                generator,
                self.teacher,
                self.perceptual,
            )
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (flow + distance).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        with torch.no_grad():
            weight = min(settings.ema, (1 + self.step) / (10 + self.step))
            for mean, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(new, 1 - weight)
        losses = {"loss": float(flow.detach())}
        return losses | ({"perceptual": float(distance.detach())} if self.perceptual else {})

    def save(self, folder: Path) -> None:
        """Everything that a resumed training needs, as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        state |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for o, optimizer in enumerate(self.optimizers):
            state |= {f"optimizer.{o}.{k}": v for k, v in optimizer_state(optimizer).items()}
        state["step"] = torch.tensor(self.step)
        about = {"identity": json.dumps(self.identity, sort_keys=True)}
        with written(folder / CHECKPOINT) as temporary:
            save_file({k: v.contiguous() for k, v in state.items()}, temporary, about)

    def load(self, folder: Path) -> None:
        """The inverse of `save`. Raises ConfigError if the checkpoint is of another training."""
        check_checkpoint(folder, self.identity)
        state = load_file(folder / CHECKPOINT)
        self.step = int(state.pop("step"))
        self.network.load_state_dict(part(state, "network"))
        self.average.load_state_dict(part(state, "average"))
        for o, optimizer in enumerate(self.optimizers):
            restore_optimizer(optimizer, part(state, f"optimizer.{o}"))


def train(
    trainer: Trainer,
    data: TrainingData,
    folder: Path,
    report: Callable[[dict[str, float]], None],
    forward: torch.nn.Module | None = None,
    sample: Callable[[FlowTransformer, int], None] | None = None,
    sample_every: int = 1000,
) -> FlowTransformer:
    """Trains to `settings.steps`, saving checkpoints into `folder` and resuming from one that is there.

    `report` gets step, `train_step`'s losses (means since the last report, of this rank), learning rate and images a
    second every 50 steps. With several ranks `forward` is the network as wrapped for them, and the first one saves and
    calls `sample` with the averaged network and the step every `sample_every` steps. Returns the averaged network.
    Raises ConfigError if the checkpoint is of another training, FloatingPointError if the loss is not finite.
    """
    if (folder / CHECKPOINT).is_file():
        trainer.load(folder)
    settings, losses, since = trainer.settings, list[dict[str, float]](), time.perf_counter()
    while trainer.step < settings.steps:
        losses.append(trainer.train_step(data, forward))
        loss = sum(losses[-1].values())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} at step {trainer.step}; begin again under another name, with a lower "
                "learning rate"
            )
        if trainer.step % 50 == 0:
            seconds = time.perf_counter() - since
            report(
                {
                    "step": trainer.step,
                    **{name: float(np.mean([row[name] for row in losses])) for name in losses[0]},
                    "learning_rate": settings.learning_rate * rate_factor(trainer.step, settings),
                    "images_per_second": len(losses) * settings.batch / seconds,
                }
            )
            losses, since = [], time.perf_counter()
        if trainer.rank == 0 and (trainer.step % settings.checkpoint_every == 0 or trainer.step == settings.steps):
            trainer.save(folder)
        if sample and trainer.rank == 0 and trainer.step % sample_every == 0:
            sample(trainer.average, trainer.step)
    return trainer.average
