"""Deep SAD, k-NN and both together: ranking by distance, determinism, collapse, pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from kka_ray.config.models import DeepSad, FusedEvaluator, KnnEvaluator
from kka_ray.confusion.base import COLLAPSED, Evaluator, relative_variance
from kka_ray.confusion.deep_sad import DeepSadEvaluator
from kka_ray.confusion.fused import Fused
from kka_ray.confusion.hardness import Scale
from kka_ray.confusion.knn import Knn
from kka_ray.encoders.whitening import Whitening
from kka_ray.errors import StageError
from kka_ray.features.pixels import pixels
from tests.confusion.clouds import DIMENSIONS, cloud

NONE = np.zeros((0, DIMENSIONS), np.float32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeepSadEvaluator(DeepSad()),
        lambda: DeepSadEvaluator(DeepSad(components=None)),
        lambda: Knn(KnnEvaluator()),
        lambda: Fused(FusedEvaluator()),
    ],
)
def test_scores_rise_with_the_distance_of_unseen_anomalies(make) -> None:
    evaluator: Evaluator = make()
    normals = cloud(300, 0, 0)
    evaluator.fit(normals, np.concatenate([cloud(20, d, 10 + d) for d in (1, 3, 5)]), seed=0)
    distances = np.repeat(np.arange(6), 40)
    scores = evaluator.score(np.concatenate([cloud(40, d, 20 + d) for d in range(6)]))
    assert scores.dtype == np.float32
    assert scores.shape == (240,)
    assert spearmanr(scores, distances)[0] >= 0.8


def test_a_normal_given_several_times_is_one_neighbour() -> None:
    normals, unseen = cloud(100, 0, 0), cloud(40, 3, 1)
    once, repeated = Knn(KnnEvaluator()), Knn(KnnEvaluator())
    once.pretrain(normals, seed=0)
    repeated.pretrain(np.concatenate([normals, *[normals[:10]] * 5]), seed=0)
    assert np.allclose(repeated.score(unseen), once.score(unseen), rtol=1e-5)
    assert not np.allclose(repeated.centre, once.centre, rtol=1e-3), "its weight counts there"


def test_labelled_anomalies_are_pushed_away() -> None:
    normals, anomalies, others = cloud(300, 0, 0), cloud(60, 1.5, 1), cloud(60, 1.5, 2)
    # All on one side, where a one-class evaluator sees nothing special.
    anomalies[:, 5] += 1
    others[:, 5] += 1
    ratios = []
    for given in (NONE, anomalies):
        evaluator = DeepSadEvaluator(DeepSad())
        evaluator.fit(normals, given, seed=0)
        ratios.append(np.median(evaluator.score(others)) / np.median(evaluator.score(cloud(200, 0, 3))))
    assert ratios[1] > 1.5 * ratios[0]


def test_a_single_anomaly_is_pushed_away_and_not_drawn_in() -> None:
    normals, odd = cloud(100, 0, 0), cloud(1, 1.5, 1)
    beyond = []
    for given in (NONE, odd):
        evaluator = DeepSadEvaluator(DeepSad(epochs=20))
        evaluator.fit(normals, given, seed=0)
        beyond.append(float(evaluator.score(odd)[0] / np.median(evaluator.score(cloud(100, 0, 3)))))
    assert beyond[1] > 1.5 * beyond[0]


def test_balanced_anomalies_push_as_far_however_many_there_are() -> None:
    """The same ones eight times over move the scale of hardness only where each has a weight of its own."""

    def aside(count: int, seed: int) -> np.ndarray:
        x = cloud(count, 1, seed)
        x[:, 5] += 1
        return x

    normals, unseen, known, judged = cloud(300, 0, 0), cloud(200, 0, 3), aside(24, 1), aside(100, 4)

    def beyond(copies: int, *, balanced: bool) -> float:
        evaluator = DeepSadEvaluator(DeepSad(balanced=balanced, epochs=10))
        evaluator.fit(normals, np.tile(known, (copies, 1)), seed=0)
        return float(np.median(Scale.of(evaluator.score(unseen)).hardness(evaluator.score(judged))))

    balanced, plain = (beyond(8, balanced=b) / beyond(1, balanced=b) for b in (True, False))
    assert 0.8 < balanced < 1.25
    assert plain > 1.4


def test_score_is_the_squared_distance_of_the_embedding_from_the_centre() -> None:
    evaluator = DeepSadEvaluator(DeepSad(width=7, epochs=2))
    evaluator.fit(cloud(50, 0, 0), cloud(5, 2, 1), seed=0)
    x = cloud(9, 1, 2)
    assert evaluator.embed(x).shape == (9, 7)
    assert np.allclose(evaluator.score(x), ((evaluator.embed(x) - evaluator.centre) ** 2).sum(1), rtol=1e-5)
    assert (np.abs(evaluator.centre) >= 0.1 - 1e-6).all()


def test_fit_repeats_bit_for_bit_and_leaves_the_global_generator_alone() -> None:
    def scores(seed: int) -> np.ndarray:
        evaluator = DeepSadEvaluator(DeepSad(epochs=5, pretrain_epochs=2))
        evaluator.fit(cloud(80, 0, 0), cloud(10, 2, 1), seed=seed)
        return evaluator.score(cloud(20, 1, 2))

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = scores(3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert np.array_equal(first, scores(3))
    assert not np.array_equal(first, scores(4))


def test_constant_features_collapse_and_healthy_ones_do_not() -> None:
    constant = np.full((60, DIMENSIONS), 0.1, np.float32)
    for normals, collapsed in ((constant, True), (cloud(60, 0, 0), False)):
        evaluator = DeepSadEvaluator(DeepSad())
        evaluator.fit(normals, cloud(10, 2, 1), seed=0)
        assert (relative_variance(evaluator.embed(normals), evaluator.centre) <= COLLAPSED) == collapsed
        assert np.isfinite(evaluator.score(cloud(5, 1, 2))).all()


def test_no_layer_has_a_bias() -> None:
    for config in (DeepSad(), DeepSad(input="pixels", pretrain_epochs=0)):
        evaluator = DeepSadEvaluator(config)
        pixel_rows = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
        evaluator.pretrain(cloud(8, 0, 0) if config.input == "features" else pixel_rows, seed=0)
        assert all("bias" not in name for name, _ in evaluator.sphere.encoder.named_parameters())


def test_whitening_gives_leading_components_about_equal_variance() -> None:
    x = cloud(500, 0, 0) * np.linspace(3, 0.5, DIMENSIONS, dtype=np.float32)
    z = Whitening.of(x, 10)(x)
    assert z.shape == (500, 10)
    assert z.std(0).min() > 0.9
    assert np.abs(np.corrcoef(z.T) - np.eye(10)).max() < 1e-3


def test_pixels_learn() -> None:
    rng = np.random.default_rng(0)
    base = np.full((40, 48, 48, 3), 120.0)
    base[:, 12:36, 12:36] = (200, 60, 60)
    shade = rng.normal(0, 20, (40, 1, 1, 1))
    normals = pixels(list(np.clip(base + shade, 0, 255).astype(np.uint8)))
    odd = base[:16] + shade[:16]
    odd[:, 12:36, 12:36] = (60, 60, 200)
    anomalies = pixels(list(np.clip(odd, 0, 255).astype(np.uint8)))
    evaluator = DeepSadEvaluator(DeepSad(input="pixels", epochs=8, pretrain_epochs=4, batch=16))
    evaluator.fit(normals[:30], anomalies[:8], seed=0)
    assert evaluator.embed(normals).shape == (40, 128)
    assert evaluator.pretrain_losses[-1] < 0.8 * evaluator.pretrain_losses[0]
    assert evaluator.losses[-1] < 0.8 * evaluator.losses[0]
    assert evaluator.score(anomalies[8:]).min() > np.median(evaluator.score(normals[30:]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((1, 4), np.float32), "at least 2"),
        (np.zeros((4, 4, 4), np.float32), "(N, D)"),
        (np.full((4, 4), np.nan, np.float32), "not finite"),
    ],
)
def test_bad_normals_are_refused(rows: np.ndarray, message: str) -> None:
    for evaluator in (DeepSadEvaluator(DeepSad()), Knn(KnnEvaluator()), Fused(FusedEvaluator())):
        with pytest.raises(StageError) as error:
            evaluator.pretrain(rows, seed=0)
        assert message in str(error.value)


def test_the_logarithm_of_a_fused_distance_is_the_mean_of_both() -> None:
    normals, validation, anomalies = cloud(300, 0, 0), cloud(200, 0, 1), cloud(40, 1.5, 2)
    unseen = np.concatenate([cloud(40, d, 20 + d) for d in range(4)])
    deep_sad = DeepSad(epochs=5)
    fused = Fused(FusedEvaluator(deep_sad=deep_sad))
    parts = (DeepSadEvaluator(deep_sad), Knn(KnnEvaluator()))
    logs = []
    for evaluator in (fused, *parts):
        evaluator.fit(normals, anomalies, seed=0)
        logs.append(np.log(evaluator.score(unseen).astype(np.float64)))
    assert np.allclose(logs[0], (logs[1] + logs[2]) / 2, atol=1e-5)
    assert np.array_equal(fused.embed(validation), parts[0].embed(validation))


def test_pixels_must_be_small_bytes() -> None:
    with pytest.raises(StageError, match="uint8"):
        DeepSadEvaluator(DeepSad(input="pixels")).pretrain(np.zeros((4, 64, 64, 3), np.uint8), seed=0)
