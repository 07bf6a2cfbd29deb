import numpy as np
import pytest

from kka_ray.describe import drift


def test_diversity_is_the_mean_pairwise_distance() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [1 - vectors[i] @ vectors[j] for i in range(20) for j in range(i)]
    assert drift.diversity(vectors) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert drift.diversity(np.repeat(vectors[:1], 5, 0)) == pytest.approx(0, abs=1e-6)
    assert drift.diversity(vectors[:1]) == 0


def test_shares() -> None:
    assert drift.distinct_2(["a b c", "a b d"]) == pytest.approx(3 / 4)
    assert drift.unique_share(["a", "A ", "b"]) == pytest.approx(2 / 3)
    assert drift.perplexity([[-1.0, -1.0], [-1.0]]) == pytest.approx(np.e)
    assert drift.perplexity([[-1.0, -1.0, -1.0], [-5.0]]) == pytest.approx(np.exp(2)), "each token counts alike"
    assert (drift.distinct_2([]), drift.unique_share([]), drift.perplexity([])) == (0, 0, 1)
