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
from kka_ray.render.training import Settings, Trainer, TrainingData, train
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
    assert perceptual(images, images, late) < 1e-3  # float32 against bfloat16
    assert perceptual(blurred, images, late) > 2 * perceptual(lighter, images, late)


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


def test_a_training_brings_the_maps_nearer_and_tells_how_far_they_are(tmp_path: Path) -> None:
    images = ((pictures(16) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    encoder: Any = tiny.FakeTextEncoder()
    data = TrainingData.encode(images, [(f"flower {i}",) for i in range(16)], encoder, 8)

    def reports(perceptual: Perceptual | None) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = []
        settings = Settings(steps=100, batch=16, warmup=5, learning_rate=3e-3)
        learner = Trainer(tiny.flow_transformer(), settings, perceptual=perceptual)
        train(learner, data, tmp_path / str(perceptual is None), rows.append)
        return rows

    with_maps = reports(Perceptual.load(0.5, 32, 0.3, torch.device("cpu")))
    assert with_maps[-1]["perceptual"] < with_maps[0]["perceptual"]
    assert "perceptual" not in reports(None)[0]
