"""Gradient steps: shared by workers or alone, in one go or after a break, the result is the same."""

import threading

import numpy as np
import pytest
import torch

from kka_ray.config.models import (
    AeSvdd,
    BeatGan,
    DeepSvdd,
    DetectorDeepSad,
    EnergyHead,
    GenIas,
    MlpHead,
    PixelSimpleNet,
    SimpleNet,
)
from kka_ray.detectors import build
from kka_ray.detectors.training import ALONE, Training, train
from kka_ray.features.base import Features


def _features(count: int, seed: int, shift: float = 0.0) -> Features:
    rng = np.random.default_rng(seed)
    pooled, patches = rng.standard_normal((count, 12)) + shift, rng.standard_normal((count, 3, 3, 6)) + shift
    # Something to learn: gradients of noise alone are next to nothing, and Adam makes steps of their rounding.
    coarse = rng.integers(0, 200, (count, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    pixels = coarse + rng.integers(0, 56, (count, 32, 32, 3), dtype=np.uint8)
    return Features(pooled.astype(np.float32), patches.astype(np.float16), pixels=pixels)


NORMALS, VALIDATION, ANOMALIES, TEST = (_features(70, 0), _features(30, 1), _features(9, 2, 1.0), _features(40, 3, 0.5))
CONFIGS = {  # the detectors that share their steps
    "simplenet": SimpleNet(epochs=4, batch=16),
    "simplenet_pixels": PixelSimpleNet(kind="simplenet_pixels", epochs=4, encoder_epochs=4, batch=16, maps=4),
    "mlp_head": MlpHead(kind="mlp_head", epochs=4, batch=16),
    "energy_head": EnergyHead(kind="energy_head", epochs=4, batch=16),
    "beatgan": BeatGan(kind="beatgan", epochs=4, batch=16, maps=4, width=4),
    "genias": GenIas(kind="genias", generator_epochs=4, epochs=4, batch=16, maps=4, width=4),
    "deep_svdd": DeepSvdd(kind="deep_svdd", hidden=32, width=16, epochs=4, batch=16),
    "deep_sad": DetectorDeepSad(kind="deep_sad", hidden=32, width=16, epochs=4, batch=16),
    "ae_svdd": AeSvdd(kind="ae_svdd", hidden=32, width=16, pretrain_epochs=4, epochs=4, batch=16),
}
PHASES = {"simplenet": 5, "simplenet_pixels": 6, "genias": 2, "ae_svdd": 2}
"""Networks that a fit trains, one after the other, where they are not one."""


def _scores(kind: str, training: Training) -> np.ndarray:
    detector = build(CONFIGS[kind])
    detector.training = training
    detector.fit(NORMALS, ANOMALIES, VALIDATION, 0)
    return detector.score(TEST)


class _Threads(Training):
    """Shares steps among threads of this process; stands in for a process group."""

    def __init__(self, rank: int, workers: int, barrier: threading.Barrier, board: dict) -> None:
        self.rank, self.workers, self.barrier, self.board = rank, workers, barrier, board

    def rows(self, count: int) -> slice:
        return slice(self.rank * count // self.workers, (self.rank + 1) * count // self.workers)

    def add(self, gradients) -> None:
        self.board[self.rank] = [g.clone() for g in gradients]
        self.barrier.wait()
        for i, gradient in enumerate(gradients):
            gradient.copy_(sum(self.board[r][i] for r in range(self.workers)))
        self.barrier.wait()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_that_share_the_steps_end_where_one_does(kind, workers):
    barrier, board, scores = threading.Barrier(workers, timeout=60), {}, {}

    def work(rank: int) -> None:
        try:
            scores[rank] = _scores(kind, _Threads(rank, workers, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = _scores(kind, ALONE)
    for rank in range(workers):
        np.testing.assert_allclose(scores[rank], alone, rtol=1e-3, atol=1e-3)


def test_of_pixels_every_worker_computes_the_whole():
    """Batch normalisation would see a part of the batch only."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    normals = Features(NORMALS.pooled[:12], pixels=pixels)

    class Second(Training):
        def rows(self, count: int) -> slice:
            return slice(count // 2, count)

        def add(self, gradients) -> None:
            pytest.fail("the gradients are whole already")

    def scores(training: Training) -> np.ndarray:
        detector = build(AeSvdd(kind="ae_svdd", input="pixels", width=4, pretrain_epochs=0, epochs=1))
        detector.training = training
        detector.fit(normals, None, normals, 0)
        return detector.score(normals)

    assert np.array_equal(scores(Second()), scores(ALONE))


def test_the_rate_falls_from_its_own_to_nothing_on_a_cosine():
    module, places = torch.nn.Linear(1, 1, bias=False), []
    optimizer = torch.optim.SGD([{"params": module.parameters(), "lr": 0.5}])

    def epoch(step) -> None:
        for _ in range(4):
            places.append(float(module.weight.detach()))
            module.weight.grad = torch.ones(1, 1)
            step()

    train("x", module, optimizer, 5, 4, epoch, [], ALONE)
    moved = -np.diff([*places, float(module.weight.detach())])
    np.testing.assert_allclose(moved, 0.25 * (1 + np.cos(np.pi * np.arange(20) / 20)), atol=1e-5)


class _Kept(Training):
    """Keeps every checkpoint in memory, and breaks off after some."""

    def __init__(self, kept: dict[str, bytes], left: int) -> None:
        self.kept, self.left = kept, left

    def read(self, name: str) -> bytes | None:
        return self.kept.get(name)

    def keep(self, name, content) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.kept[name] = content()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("epochs", [1, 3])
def test_after_a_break_it_ends_where_it_would_have(kind, epochs):
    kept: dict[str, bytes] = {}
    with pytest.raises(KeyboardInterrupt):
        _scores(kind, _Kept(kept, epochs))
    again = _Kept(kept, 1000)
    assert np.array_equal(_scores(kind, again), _scores(kind, ALONE))
    assert 1000 - again.left == 4 * PHASES.get(kind, 1) - epochs


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_gradients_of_an_empty_part_are_zero(kind):
    class Spectator(_Kept):
        def rows(self, count: int) -> slice:
            return slice(0, 0)

    before = torch.get_rng_state()
    assert np.isfinite(_scores(kind, Spectator({}, 1000))).all()
    assert torch.equal(torch.get_rng_state(), before)
