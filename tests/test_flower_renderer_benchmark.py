from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from kka_ray.data.flower_reader import FlowerReader, accuracy
from kka_ray.render.renderer import DrawError
from tests.scripts import load_script

FILE = Path(__file__).parents[1] / "benchmarks" / "flower_renderer.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script(FILE)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_captions_are_those_of_anomalies_of_one_kind(bench: ModuleType, held_out: bool) -> None:
    drawn = bench.captioned(60, 0, held_out=held_out)
    assert {d.flower.is_held_out for d in drawn} == {held_out}
    assert {d.flower.distance for d in drawn} == {1, 2, 3, 4}
    assert [d.caption for d in drawn] != [d.caption for d in bench.captioned(60, 1, held_out=held_out)]


def test_flowers_of_the_domain_are_read_right_and_those_of_other_captions_are_not(bench: ModuleType) -> None:
    drawn = bench.captioned(100, 0, held_out=True)
    images, truth = np.stack([d.image for d in drawn]), [d.flower for d in drawn]
    reader = FlowerReader.load()
    assert accuracy(reader, images, truth)["all"] > 0.85
    assert accuracy(reader, np.roll(images, 1, axis=0), truth)["all"] < 0.1


def test_an_image_that_could_not_be_drawn_ends_the_measurement(bench: ModuleType) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    of_seeds: list[int] = []

    def draw(texts: list[str], seeds: list[int]) -> list[object]:
        of_seeds.extend(seeds)
        return [DrawError("no") if text == "bad" else image for text in texts]

    renderer = SimpleNamespace(draw=draw)
    assert bench.draw(renderer, ["a", "b"], 1).shape == (2, 64, 64, 3)
    with pytest.raises(RuntimeError, match="1 of 2 images"):
        bench.draw(renderer, ["a", "bad"], 2)
    assert len(set(of_seeds)) == 4
