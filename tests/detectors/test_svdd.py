"""Deep SVDD, Deep SAD and AE-SVDD: the losses, the radius, and what they learn from pixels."""

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from kka_ray.config.models import Detector
from kka_ray.detectors import build
from kka_ray.detectors.svdd.loss import beyond, short_of, squared_radius
from kka_ray.features.base import Features

KINDS = ("deep_svdd", "deep_sad", "ae_svdd")
RNG = np.random.default_rng(0)
CLOUD = RNG.standard_normal((64, 16)).astype(np.float32)


def _pixels(count: int, seed: int, red: float = 0.0) -> Features:
    noise = 128 + 10 * np.random.default_rng(seed).standard_normal((count, 32, 32, 3)) + red * np.array([1, 0, -1])
    return Features(np.zeros((count, 4), np.float32), pixels=noise.clip(0, 255).astype(np.uint8))


def _build(kind: str, **options):
    return build(TypeAdapter(Detector).validate_python({"kind": kind, **options}))


def test_the_radius_leaves_the_share_nu_outside_and_is_the_best_one():
    distances = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    radius = squared_radius(distances, 0.2)
    assert (distances > radius).float().mean() == pytest.approx(0.2, abs=1e-3)

    def loss(r: float) -> float:
        return r + float(beyond(distances, r, 0.2).mean())

    assert loss(radius) < min(loss(radius - 0.05), loss(radius + 0.05))


def test_anomalies_cost_until_they_are_far_enough():
    losses = short_of(torch.tensor([0.0, 2.0, 6.0, 9.0]), radius=2.0, margin=2.0)
    assert losses.tolist() == [6.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_training_draws_normals_together(kind):
    """In units of the distance before training, which a step of no size leaves as it was."""
    options = {"hidden": 64, "width": 32}
    features = Features(CLOUD)
    still, trained = _build(kind, learning_rate=1e-12, **options), _build(kind, learning_rate=1e-3, **options)
    for detector in (still, trained):
        detector.fit(features, None, features, 0)
    assert trained.score(features).max() < 0.8 * still.score(features).max()


@pytest.mark.parametrize("kind", ["deep_svdd", "deep_sad"])
@pytest.mark.parametrize("width", [8, 32])
def test_normals_cost_1_before_training_whatever_the_width(kind, width):
    """Else the weight of anomalies would mean another thing in each width."""
    detector, features = _build(kind, learning_rate=1e-12, hidden=64, width=width), Features(CLOUD)
    detector.fit(features, None, features, 0)
    z = detector._sphere.run(detector._sphere.tensor(CLOUD))
    assert float(detector._of_normals(z, z).mean()) == pytest.approx(1, rel=1e-3)


def test_the_decoder_of_ae_svdd_is_trained_beside_the_sphere():
    def decoders(kind: str) -> list[torch.Tensor]:
        found = []
        for rate in (1e-12, 1e-3):
            detector = _build(kind, learning_rate=rate, hidden=64, width=32, pretrain_epochs=0)
            detector.fit(Features(CLOUD), None, Features(CLOUD), 0)
            found.append(next(detector._sphere.decoder.parameters()))
        return found

    assert not torch.allclose(*decoders("ae_svdd"), atol=1e-4)
    assert torch.equal(*decoders("deep_svdd"))


@pytest.mark.parametrize(("kind", "pretraining"), [("deep_sad", 0), ("ae_svdd", 1)])
def test_learning_from_pixels(kind, pretraining):
    normals, anomalies = _pixels(16, 0), _pixels(6, 1, red=60)
    options = {"input": "pixels", "width": 8, "batch": 8, "pretrain_epochs": pretraining, "epochs": 3}
    options |= {"learning_rate": 1e-3}
    detectors = [_build(kind, **options) for _ in range(2)]
    for detector in detectors:
        assert detector.needs_pixels
        detector.fit(normals, anomalies, normals, 0)
    test = Features.join([_pixels(10, 2), _pixels(10, 3, red=60), _pixels(1, 4, red=-999)])
    scores = detectors[0].score(test)
    assert np.isfinite(scores).all()
    assert np.array_equal(detectors[1].score(test), scores)
    assert np.array_equal(_build(kind, **options).restore(*detectors[0].state()).score(test), scores)
    one = np.concatenate([detectors[0].score(test.take([i])) for i in range(len(test))])
    np.testing.assert_allclose(one, scores, rtol=1e-5, atol=1e-5 * float(scores.max()))
    assert np.median(scores[10:20]) > scores[:10].max()


@pytest.mark.parametrize("kind", ["deep_svdd", "ae_svdd"])
@pytest.mark.parametrize("count", [1, 3])
def test_equal_images_give_finite_scores(kind, count):
    grey = Features(np.zeros((count, 4), np.float32), pixels=np.full((count, 32, 32, 3), 90, np.uint8))
    detector = _build(kind, input="pixels", width=8, pretrain_epochs=1, epochs=1)
    detector.fit(grey, None, grey, 0)
    assert np.isfinite(detector.score(Features.join([grey, _pixels(2, 0)]))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_that_it_needs_pixels(kind):
    with pytest.raises(ValueError, match="pixels=True"):
        _build(kind, input="pixels").fit(Features(CLOUD), None, Features(CLOUD), 0)
