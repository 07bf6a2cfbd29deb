"""Detectors of pooled features: their scores are those of the definitions, worked out with NumPy and scikit-learn."""

import numpy as np
import pytest
from scipy.stats import median_abs_deviation
from sklearn.linear_model import LogisticRegression

from kka_ray.config.models import Knn, LinearHead, Mahalanobis
from kka_ray.detectors import build
from kka_ray.features.base import Features


def _features(count: int, seed: int, shift: float = 0.0) -> Features:
    x = np.random.default_rng(seed).standard_normal((count, 6)) + 2 + shift * np.eye(6)[0]
    return Features((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


NORMALS, VALIDATION, ANOMALIES, TEST = (
    _features(60, 0),
    _features(21, 1),
    _features(5, 2, -2.0),
    Features.join([_features(10, 3), _features(10, 4, -2.0)]),
)


def _fitted(config):
    detector = build(config)
    detector.fit(NORMALS, ANOMALIES, VALIDATION, 0)
    return detector


def _to_normals(x: np.ndarray, neighbours: int) -> np.ndarray:
    return np.sort(1 - x.astype(float) @ NORMALS.pooled.T.astype(float), axis=1)[:, :neighbours].mean(axis=1)


@pytest.mark.parametrize("neighbours", [1, 3, 60, 99])
def test_knn_is_the_mean_distance_to_the_nearest_normals(neighbours):
    found = _fitted(Knn(kind="knn", neighbours=neighbours)).score(TEST)
    np.testing.assert_allclose(found, _to_normals(TEST.pooled, neighbours), rtol=1e-5)


def test_mahalanobis_is_the_distance_under_the_shrunk_covariance():
    x = NORMALS.pooled.astype(float)
    covariance = np.cov(x.T)
    shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / 6 * np.eye(6)
    centred = TEST.pooled - x.mean(axis=0)
    wanted = np.sqrt(np.einsum("nc,cd,nd->n", centred, np.linalg.inv(shrunk), centred))
    found = _fitted(Mahalanobis(kind="mahalanobis", shrinkage=0.3)).score(TEST)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def _balanced(x: np.ndarray) -> np.ndarray:
    """The decision of scikit-learn's regression with balanced classes."""
    rows, truth = np.concatenate([NORMALS.pooled, ANOMALIES.pooled]).astype(float), np.repeat([0, 1], [60, 5])
    return LogisticRegression(max_iter=2000, class_weight="balanced").fit(rows, truth).decision_function(x)


def test_a_head_balances_few_anomalies_with_many_normals():
    found = _fitted(LinearHead(kind="head")).score(TEST)
    np.testing.assert_allclose(found, _balanced(TEST.pooled), rtol=1e-2, atol=1e-2)


def test_fused_adds_head_and_neighbours_each_in_deviations_of_validation_normals():
    def standardised(score) -> np.ndarray:
        reference = score(VALIDATION.pooled)
        return (score(TEST.pooled) - np.median(reference)) / median_abs_deviation(reference)

    wanted = standardised(_balanced) + standardised(lambda x: _to_normals(x, 5))
    found = _fitted(LinearHead(kind="fused", neighbours=5)).score(TEST)
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2)
