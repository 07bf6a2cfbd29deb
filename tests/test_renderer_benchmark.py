import importlib.util
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "renderer.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("renderer_benchmark", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_class_ranks_count_the_centroids_that_are_nearer(bench):
    centroids = np.eye(3)
    drawn = np.array([[0.9, 0.4, 0.1], [0.9, 0.4, 0.1], [0.9, 0.4, 0.1]])
    assert bench.class_ranks(drawn, np.array([0, 1, 2]), centroids).tolist() == [0, 1, 2]


def test_frechet_distance_is_that_of_gaussians(bench):
    rng = np.random.default_rng(0)
    first = rng.normal(size=(20_000, 2))
    assert bench.frechet(first, first) == pytest.approx(0, abs=1e-6)
    # Of N(0, 1) and N(m, s^2) it is m^2 + (s - 1)^2, dimension by dimension.
    second = rng.normal(size=(20_000, 2)) * [2, 1] + [0, 3]
    assert bench.frechet(first, second) == pytest.approx(9 + 1, rel=0.05)


def test_real_and_drawn_of_one_distribution_cannot_be_told_apart(bench):
    rng = np.random.default_rng(0)
    real, same = rng.normal(size=(200, 4)), rng.normal(size=(200, 4))
    assert bench.real_vs_drawn(real, same, 0) == pytest.approx(0.5, abs=0.1)
    assert bench.real_vs_drawn(real, same + 2, 0) > 0.95


def test_summary_has_means_and_spreads(bench):
    # The deviation is that of a sample: 0.1 * sqrt(2).
    assert bench.summary([{"auc": 0.9}, {"auc": 0.7}]) == pytest.approx({"auc": 0.8, "auc_std": 0.02**0.5})
