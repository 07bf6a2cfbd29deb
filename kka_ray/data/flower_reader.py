"""Reads the species attributes off a picture of the demo domain: a small convolutional network with a head each.

It answers "does the picture show what the text says?" for drawn flowers, in tests and in benchmarks; nothing in the
loop uses it. It is trained on procedurally drawn flowers, none of which has a held-out combination of attributes, and
with augmentation that resembles what renderers do to a picture: blur, noise, shifted colours, 8 x 8 block artefacts.

The shipped weights are made by `python -m kka_ray.data.flower_reader train`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from kka_ray.data import flowers
from kka_ray.data.flowers import ATTRIBUTES, Flower
from kka_ray.errors import AssetError, DataError

WEIGHTS = Path(__file__).parent / "weights" / "flower_reader"
"""Folder of the shipped weights."""

_SHARD = 1000
_TRAIN_SEED, _TEST_SEED = 101, 102


@dataclass(frozen=True)
class Reading:
    """What was read off N pictures.

    flowers: the most probable value of each attribute, a picture each.
    probabilities: for each attribute float32 (N, values), in the order of `flowers.ATTRIBUTES`; rows sum to 1.
    """

    flowers: list[Flower]
    probabilities: dict[str, np.ndarray]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width, 3, 1)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.norm(self.second(self.first(x))))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class _Network(nn.Module):
    """Pictures (N, 3, 64, 64) in [-1, 1] to the attributes' logits, side by side (N, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _convolution(3, 32, 4, 2),
            _convolution(32, 64, 3, 2),
            _Residual(64),
            _Residual(64),
            _convolution(64, 128, 3, 2),
            _Residual(128),
            _Residual(128),
        )
        # The mean tells how much there is of something, the maximum whether it is there at all.
        self.heads = nn.Linear(256, sum(len(values) for values in ATTRIBUTES.values()))

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images)
        return self.heads(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1).float())


def _split(logits: Tensor) -> tuple[Tensor, ...]:
    """The logits (N, 28) by attribute, in the order of `ATTRIBUTES`."""
    return logits.split([len(values) for values in ATTRIBUTES.values()], dim=1)


class FlowerReader:
    """Reads `Flower`s off 64 px pictures."""

    def __init__(self, network: _Network) -> None:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path = WEIGHTS) -> Self:
        """The reader whose weights lie in `folder`. Raises AssetError if they are missing or damaged."""
        file = folder / "model.safetensors"
        try:
            state = load_file(file)
        except (OSError, SafetensorError) as error:
            raise AssetError(
                f"cannot read the flower reader's weights {file}: {error}. "
                "Make them with `python -m kka_ray.data.flower_reader train`"
            ) from error
        network = _Network()
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        return cls(network)

    @torch.inference_mode()
    def read(self, images: np.ndarray, batch: int = 256) -> Reading:
        """Reads pictures, uint8 (N, 64, 64, 3). Raises DataError if they are of another shape or type."""
        if images.dtype != np.uint8 or images.shape[1:] != (flowers.SIZE, flowers.SIZE, 3):
            raise DataError(
                f"the flower reader takes uint8 images (N, 64, 64, 3), got {images.dtype} {images.shape}; "
                "resize them first"
            )
        logits = [torch.zeros(0, self._network.heads.out_features)]
        for start in range(0, len(images), batch):
            logits.append(self._network(_to_input(images[start : start + batch])))
        names, parts = list(ATTRIBUTES), _split(torch.cat(logits))
        best = [part.argmax(1).tolist() for part in parts]
        read = [
            Flower(**{name: ATTRIBUTES[name][i] for name, i in zip(names, row, strict=True)})
            for row in zip(*best, strict=True)
        ]
        probabilities = {name: part.softmax(1).numpy() for name, part in zip(names, parts, strict=True)}
        return Reading(read, probabilities)


def accuracy(reader: FlowerReader, images: np.ndarray, truth: list[Flower]) -> dict[str, float]:
    """The share of pictures on which each attribute is read right, and `all`: every attribute at once."""
    read = reader.read(images).flowers
    pairs = list(zip(read, truth, strict=True))
    right = {name: [getattr(a, name) == getattr(b, name) for a, b in pairs] for name in ATTRIBUTES}
    right["all"] = [a == b for a, b in pairs]
    return {name: float(np.mean(hits)) for name, hits in right.items()}


def _to_input(images: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


# --- training -----------------------------------------------------------------------------------------------------


def _draw_shard(seed: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = flowers.make_renderer_data(_SHARD, seed, shard)
    labels = [[values.index(getattr(d.flower, name)) for name, values in ATTRIBUTES.items()] for d in drawn]
    return np.stack([d.image for d in drawn]), np.array(labels, np.int64)


def training_images(count: int, seed: int, workers: int, cache: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Drawn flowers without held-out combinations: uint8 (N, 64, 64, 3), and int64 (N, 5) indices of their values.

    `count` is rounded up to whole shards of 1,000, which `workers` processes draw. With `cache` they are kept there.
    """
    shards = math.ceil(count / _SHARD)
    source = hashlib.sha256(Path(flowers.__file__).read_bytes()).hexdigest()[:8]
    file = None if cache is None else cache / f"flowers-{seed}-{shards}-{source}.npz"
    if file is not None and file.is_file():
        with np.load(file) as stored:
            return stored["images"], stored["labels"]
    # Spawned, not forked: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(functools.partial(_draw_shard, seed), range(shards), chunksize=1)
    images, labels = (np.concatenate(p) for p in zip(*parts, strict=True))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, images=images, labels=labels)
    return images, labels


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """What leaves the attributes as they are: images (N, 3, S, S) in [-1, 1], each changed in its own way."""
    count = len(images)

    def chance(share: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) < share

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.rand(count, channels, 1, 1, generator=generator) * (high - low) + low

    images = torch.where(chance(0.5), images.flip(3), images)
    images = torch.where(chance(0.5), images.flip(2), images)
    images = torch.where(chance(0.5), images.transpose(2, 3), images)
    # One shift for the batch: cheap, and different at every step.
    dx, dy = torch.randint(-4, 5, (2,), generator=generator).tolist()
    images = functional.pad(images, (4, 4, 4, 4), mode="replicate")[:, :, 4 + dy : 68 + dy, 4 + dx : 68 + dx]
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.where(chance(0.4), torch.lerp(images, blurred, uniform(0.2, 0.9)), images)
    images = torch.where(chance(0.3), _quantise_blocks(images, uniform(0.05, 0.4)[..., None, None]), images)
    images = images * uniform(0.88, 1.12) * uniform(0.95, 1.05, 3) + uniform(-0.08, 0.08)
    noise = torch.randn(images.shape, generator=generator) * uniform(0.0, 0.06)
    return (images + noise).clamp(-1, 1)


def _quantise_blocks(images: Tensor, step: Tensor) -> Tensor:
    """Rounds the cosine coefficients of 8 x 8 blocks to multiples of `step` (N, 1, 1, 1, 1, 1): JPEG's artefacts."""
    n = torch.arange(8.0)
    basis = torch.cos(math.pi / 8 * (n + 0.5) * n[:, None]) * math.sqrt(2 / 8)
    basis[0] /= math.sqrt(2)
    blocks = images.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    coefficients = basis @ blocks @ basis.T
    blocks = basis.T @ (torch.round(coefficients / step) * step) @ basis
    return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def fit(images: np.ndarray, labels: np.ndarray, epochs: int, seed: int = 0, batch: int = 128) -> FlowerReader:
    """Trains a reader by cross-entropy summed over the attributes: AdamW, one cycle, bf16 autocast."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = _Network()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.15)
    truth = torch.from_numpy(labels)
    started = time.perf_counter()
    for epoch in range(epochs):
        losses = []
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // batch * batch].split(batch):
            inputs = augment(_to_input(images[rows.numpy()]), generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                parts = _split(network(inputs))
            loss = sum(functional.cross_entropy(part.float(), truth[rows, i]) for i, part in enumerate(parts))
            assert isinstance(loss, Tensor)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return FlowerReader(network)


def save(reader: FlowerReader, folder: Path) -> None:
    """Writes the weights in float16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = reader._network.state_dict()
    halves = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    save_file(halves, folder / "model.safetensors")


def _as_flowers(labels: np.ndarray) -> list[Flower]:
    return [
        Flower(**{name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), row, strict=True)})
        for row in labels.tolist()
    ]


def _card(command: str, figures: dict[str, dict[str, float]]) -> str:
    names = [*ATTRIBUTES, "all"]
    rows = [f"| {where} | " + " | ".join(f"{values[n]:.4f}" for n in names) + " |" for where, values in figures.items()]
    return "\n".join(
        [
            "# Flower reader",
            "",
            "A small convolutional network that reads petal count, petal shape, petal colour, centre colour and petal",
            "pattern off a 64 px picture of the demo domain (`kka_ray.data.flower_reader`). Float16 safetensors.",
            "",
            "Trained on procedurally drawn flowers without the held-out combinations of attributes, with augmentation:",
            "",
            f"    {command}",
            "",
            "Share of pictures read right. `all` is every attribute at once; `new pictures` have attribute",
            "combinations as in training, `held-out combinations` are those of the domain's test anomalies.",
            "",
            "| | " + " | ".join(names) + " |",
            "| --- |" + " --- |" * len(names),
            *rows,
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """`python -m kka_ray.data.flower_reader train`: trains, measures and writes the weights with their card."""
    parser = argparse.ArgumentParser(prog="python -m kka_ray.data.flower_reader", description=main.__doc__)
    parser.add_argument("verb", choices=["train"])
    parser.add_argument("--images", type=int, default=20_000, help="training pictures")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw the pictures")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute")
    parser.add_argument("--cache", type=Path, default=None, help="folder in which drawn pictures are kept")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    images, labels = training_images(options.images, _TRAIN_SEED, options.workers, options.cache)
    test_images, test_labels = training_images(2000, _TEST_SEED, options.workers, options.cache)
    fresh = flowers.make_test_anomalies(500, _TEST_SEED)

    save(fit(images, labels, options.epochs), options.out)
    # What is measured is what was written, in its float16.
    reader = FlowerReader.load(options.out)
    figures = {
        "new pictures": accuracy(reader, test_images, _as_flowers(test_labels)),
        "held-out combinations": accuracy(reader, np.stack([d.image for d in fresh]), [d.flower for d in fresh]),
    }
    command = f"python -m kka_ray.data.flower_reader train --images {options.images} --epochs {options.epochs}"
    (options.out / "README.md").write_text(_card(command, figures))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
