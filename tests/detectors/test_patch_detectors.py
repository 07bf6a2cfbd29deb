"""PatchCore and PaDiM: the coreset, the reweighting and the Gaussians by place."""

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from kka_ray.config.models import Detector, Padim, PatchCore
from kka_ray.detectors import build
from kka_ray.detectors.patchcore.coreset import greedy_centers, project
from kka_ray.features.base import Features
from kka_ray.features.robust import Robust


def _features(patches: np.ndarray) -> Features:
    pooled = patches.reshape(len(patches), -1)[:, :8] + 1
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return Features(unit.astype(np.float32), patches.astype(np.float16))


def _grid(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 3, 6))


def test_each_center_is_the_row_farthest_from_those_before_it():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    centers = greedy_centers(x, 20, torch.Generator().manual_seed(1))
    assert len(set(centers.tolist())) == 20
    distance = torch.cdist(x, x)
    for i in range(1, 20):
        nearest = distance[:, centers[:i]].min(1).values
        assert float(nearest[centers[i]]) == pytest.approx(float(nearest.max()), rel=1e-4)


def test_a_coreset_covers_rare_rows_that_a_random_choice_misses():
    x = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    x[:3] += 30
    assert (greedy_centers(x, 20, torch.Generator().manual_seed(1)) < 3).any()


def test_equal_rows_give_as_many_centers_as_asked_for():
    assert sorted(greedy_centers(torch.ones(4, 3), 9, torch.Generator().manual_seed(0)).tolist()) == [0, 1, 2, 3]


def test_a_random_projection_nearly_keeps_distances():
    x = torch.randn(50, 400, generator=torch.Generator().manual_seed(0))
    ratio = torch.pdist(project(x, 128, torch.Generator().manual_seed(1))) / torch.pdist(x)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)
    assert float(ratio.std()) < 0.1


def test_with_all_patches_in_memory_the_heat_map_is_the_nearest_distance():
    normals, test = _grid(5, 0), _grid(4, 1).astype(np.float16).astype(np.float64)
    detector = build(PatchCore(kind="patchcore", coreset=1, image_weight=0))
    detector.fit(_features(normals), None, _features(_grid(3, 2)), 0)
    memory = normals.astype(np.float16).astype(np.float64).reshape(-1, 6)
    expected = np.linalg.norm(test[..., None, :] - memory, axis=-1).min(-1)
    np.testing.assert_allclose(detector.heatmap(_features(test)), expected, rtol=1e-4)


def test_a_few_distances_at_a_time_give_the_same(monkeypatch):
    normals, validation, test = (_features(_grid(n, seed)) for seed, n in enumerate((5, 3, 4)))

    def found() -> tuple[np.ndarray, np.ndarray]:
        detector = build(PatchCore(kind="patchcore", coreset=1))
        detector.fit(normals, None, validation, 0)
        return detector.score(test), detector.heatmap(test)

    whole = found()
    monkeypatch.setattr("kka_ray.detectors.patchcore.model._DISTANCES", 1)
    for one, other in zip(whole, found(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_score_is_the_worst_patch_reweighted_by_its_neighbourhood():
    normals, test = _grid(5, 0), _features(_grid(4, 1))
    plain, weighted = (build(PatchCore(kind="patchcore", coreset=1, image_weight=0, neighbours=n)) for n in (0, 3))
    for detector in (plain, weighted):
        detector.fit(_features(normals), None, _features(_grid(3, 2)), 0)
    worst = plain.heatmap(test).max((1, 2))
    np.testing.assert_allclose(plain.score(test), worst, rtol=1e-6)
    # Of three memories the nearest has at most a third of the sum.
    assert (weighted.score(test) >= worst * (2 / 3 - 1e-6)).all()
    assert (weighted.score(test) < worst).all()


def test_the_reweighting_is_that_of_the_paper():
    """Eq. 7, computed patch by patch from all normal patches: s = (1 - exp(d*) / sum of exp(d_m)) d*, with d* the
    distance of the worst patch to its nearest memory m*, and d_m those to the 4 memories nearest to m*."""
    normals, test = _grid(6, 0), _grid(4, 1)
    detector = build(PatchCore(kind="patchcore", coreset=1, image_weight=0, neighbours=4))
    detector.fit(_features(normals), None, _features(_grid(3, 2)), 0)
    memory = normals.astype(np.float16).astype(np.float64).reshape(-1, 6)
    expected = []
    for patches in test.astype(np.float16).astype(np.float64).reshape(4, -1, 6):
        distance = np.linalg.norm(patches[:, None] - memory, axis=2)
        worst = distance.min(1).argmax()
        nearest = distance[worst].argmin()
        around = np.linalg.norm(memory - memory[nearest], axis=1).argsort()[:4]
        share = np.exp(distance[worst, nearest]) / np.exp(distance[worst, around]).sum()
        expected.append((1 - share) * distance[worst, nearest])
    np.testing.assert_allclose(detector.score(_features(test)), expected, rtol=1e-4)


def test_padim_knows_what_is_normal_where():
    normals = 0.1 * _grid(50, 0)
    normals[:, 0, 0] += 5  # only the corner is bright
    moved = 0.1 * _grid(10, 1)
    moved[:, 2, 2] += 5
    detector = build(Padim(kind="padim", image_weight=0))
    detector.fit(_features(normals), None, _features(0.1 * _grid(5, 2)), 0)
    heat = detector.heatmap(_features(moved))
    assert (heat[:, 0, 0] > 5 * heat[:, 1, 1]).all()
    assert (heat[:, 2, 2] > 5 * heat[:, 1, 1]).all()


def test_padim_is_the_mahalanobis_distance_by_place():
    normals, test = _grid(40, 0), _grid(3, 1)
    detector = build(Padim(kind="padim", channels=4, shrinkage=0.2, image_weight=0))
    detector.fit(_features(normals), None, _features(_grid(5, 2)), 0)
    kept = detector.state()[0]["channels"].numpy()
    assert len(set(kept)) == 4
    x = normals.astype(np.float16).astype(np.float64)[..., kept]
    covariances = {(i, j): np.cov(x[:, i, j].T) for i in range(3) for j in range(3)}
    mean_variance = np.mean([np.diag(c) for c in covariances.values()])
    for (i, j), covariance in covariances.items():
        inverse = np.linalg.inv(0.8 * covariance + 0.2 * mean_variance * np.eye(4))
        centred = test.astype(np.float16).astype(np.float64)[:, i, j, kept] - x[:, i, j].mean(0)
        expected = np.sqrt(np.einsum("nc,cd,nd->n", centred, inverse, centred))
        np.testing.assert_allclose(detector.heatmap(_features(test))[:, i, j], expected, rtol=1e-3)
    worst = detector.heatmap(_features(test)).max((1, 2))
    np.testing.assert_allclose(detector.score(_features(test)), worst, rtol=1e-6)


@pytest.mark.parametrize("kind", ["patchcore", "padim"])
def test_the_whole_image_counts_by_its_weight_beside_the_worst_patch(kind):
    normals, validation, test = (_features(_grid(n, n)) for n in (30, 9, 5))
    scores = {}
    for weight in (0.0, 1.0, 3.0):
        detector = build(TypeAdapter(Detector).validate_python({"kind": kind, "image_weight": weight}))
        detector.fit(normals, None, validation, 0)
        scores[weight] = detector.score(test)
        if weight == 0:
            patch = Robust.of(detector.score(validation))(scores[0.0])
    image = (scores[3.0] - scores[1.0]) / 2
    assert np.abs(image).min() > 0.01
    np.testing.assert_allclose(scores[1.0] - image, patch, rtol=1e-3, atol=1e-3)


def test_a_place_where_nothing_varies_keeps_a_distance():
    normals = _grid(30, 0)
    normals[:, 1, 1] = 0
    detector = build(Padim(kind="padim"))
    detector.fit(_features(normals), None, _features(_grid(5, 1)), 0)
    heat = detector.heatmap(_features(_grid(5, 2)))
    assert np.isfinite(heat).all()
    assert (heat[:, 1, 1] > heat.mean()).all()
