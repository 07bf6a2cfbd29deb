from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from kka_ray import assets
from kka_ray.data import flowers
from kka_ray.render.perceptual import Perceptual
from kka_ray.render.training import Settings, Trainer, TrainingData, flow_loss, train
from tests.render import tiny

pytestmark = pytest.mark.skipif(
    not assets.is_present("builtin:efficientnet-lite0"), reason="needs EfficientNet-Lite0: `kka setup`"
)


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    return Perceptual.load(0.5, 64, 0.3, torch.device("cpu"))


def pictures(count: int) -> torch.Tensor:
    """Flowers (N, 3, 32, 32) in [-1, 1]."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(np.stack([flowers.make(flowers.sample_normal(rng), rng).image for _ in range(count)]))
    return functional.interpolate(images.permute(0, 3, 1, 2).float() / 127.5 - 1, (32, 32), mode="area")


def test_blur_is_further_than_a_change_of_light_with_the_same_squared_error(perceptual: Perceptual) -> None:
    images = pictures(4)
    blurred = functional.interpolate(functional.avg_pool2d(images, 4), (32, 32), mode="bilinear")
    lighter = images + (blurred - images).square().mean((1, 2, 3), keepdim=True).sqrt()
    late = torch.ones(4)
    blur = perceptual(blurred, images, late)
    assert blur > 2 * perceptual(lighter, images, late)
    assert perceptual(images, images, late) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        # Of the wanted maps alone: the found ones are float32's.
        assert perceptual(images, images, late) < 0.1 * blur


def test_noisy_images_are_left_out_and_only_predictions_get_a_gradient(perceptual: Perceptual) -> None:
    clean, images = pictures(4).flip(0).requires_grad_(), pictures(4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        distance = perceptual(clean, images, torch.tensor([0.1, 0.9, 0.2, 0.3]))
    distance.backward()
    assert clean.grad is not None
    assert [bool(g.any()) for g in clean.grad] == [False, True, False, True]
    assert images.grad is None
    none = perceptual(clean, images, torch.full((4,), 0.1))
    none.backward()
    assert none == 0


def test_a_training_with_it_brings_the_maps_nearer_than_one_without(tmp_path: Path) -> None:
    images = pictures(16)
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    encoder: Any = tiny.FakeTextEncoder()
    data = TrainingData.encode(pixels, [(f"flower {i}",) for i in range(16)], encoder, 8)
    measure = Perceptual.load(0.5, 32, 0.3, torch.device("cpu"))

    def trained(perceptual: Perceptual | None) -> tuple[float, list[dict[str, float]]]:
        """How far the maps of what the network predicts are from the images' in the end, and what was reported."""
        rows: list[dict[str, float]] = []
        settings = Settings(steps=100, batch=16, warmup=5, learning_rate=3e-3)
        learner = Trainer(tiny.flow_transformer(), settings, perceptual=perceptual)
        train(learner, data, tmp_path / str(perceptual is None), rows.append)
        text, mask = data.text(data.captions[:, 0])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            _, distance = flow_loss(learner.network, images, text, mask, generator, None, measure)
        return float(distance), rows

    (with_it, told), (without, plain) = trained(measure), trained(None)
    assert with_it < 0.9 * without
    assert told[-1]["perceptual"] < told[0]["perceptual"]
    assert "perceptual" not in plain[0]
