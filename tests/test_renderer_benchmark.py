from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kka_ray.render.renderer import DrawError
from tests.scripts import load_script

FILE = Path(__file__).parents[1] / "benchmarks" / "renderer.py"


@pytest.fixture(scope="module")
def bench():
    return load_script(FILE)


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
    assert bench.summary([{"auc": 0.9}]) == {"auc": 0.9}


def test_the_ratio_of_gains_is_that_of_the_means(bench):
    rows = [{"seen_gain": 0.02, "unseen_gain": 0.01}, {"seen_gain": 0.06, "unseen_gain": 0.05}]
    # The ratios of the seeds are 1/2 and 5/6.
    wanted = {"unseen_gain_ratio": 0.75, "unseen_gain_ratio_std": (1 / 3) / 2**0.5}
    assert bench.gain_ratio(rows) == pytest.approx(wanted)
    assert bench.gain_ratio(rows[:1]) == pytest.approx({"unseen_gain_ratio": 0.5})


def test_what_could_not_be_drawn_does_not_shift_the_labels(bench, monkeypatch, tmp_path):
    """Ten classes whose every image has its class's own feature; the renderer misses some."""
    monkeypatch.setattr(bench, "SHOWN", ("c0", "c3"))
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 40)
    noisy = np.eye(10)[labels] + 0.05 * rng.standard_normal((400, 10))

    def draw(texts, seed):
        drawn = [np.full((8, 8, 3), int(text[-1]), np.uint8) for text in texts]
        return [DrawError("no") if i in (0, 7, 61) else image for i, image in enumerate(drawn)]

    def features(images):
        rows = np.eye(10)[[image[0, 0, 0] for image in images]]
        return rows + 0.05 * np.random.default_rng(1).standard_normal(rows.shape)

    fake = SimpleNamespace(
        train=noisy,
        train_labels=labels,
        test=noisy[::-1],
        classes=[f"c{i}" for i in range(10)],
        renderer=SimpleNamespace(draw=draw),
        _features=features,
    )
    found = bench.Bench.fidelity(fake, 0, tmp_path / "grid.png")
    assert found["class_top1"] == 1
    assert found["class_failed"] == 3
    assert (tmp_path / "grid.png").is_file()
