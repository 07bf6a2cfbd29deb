from __future__ import annotations

import numpy as np
import pytest

from kka_ray.render.attributes import Attributes, measure
from kka_ray.render.captions import vary

NOTHING = Attributes(None, None, False, None, None)


def _flat(colour: tuple[int, int, int], size: int = 32) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (size, size, 3)).copy()


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((220, 20, 20), "red"),
        ((250, 150, 20), "orange"),
        ((240, 230, 40), "yellow"),
        ((40, 160, 60), "green"),
        ((50, 90, 220), "blue"),
        ((150, 60, 200), "purple"),
        ((240, 120, 180), "pink"),
        ((120, 80, 50), "brown"),
        ((5, 5, 8), "black"),
        ((128, 128, 130), "grey"),
        ((250, 250, 250), "white"),
    ],
)
def test_colours_of_the_middle_and_the_edge(rgb: tuple[int, int, int], name: str) -> None:
    image = _flat((255, 255, 255) if name != "white" else (0, 0, 0))
    image[8:24, 8:24] = rgb
    seen = measure(image)
    assert seen.colour == name
    assert seen.background == ("white" if name != "white" else "black")
    assert seen.plain


def test_light_and_texture() -> None:
    assert measure(_flat((250, 250, 250))).light == "bright"
    assert measure(_flat((20, 20, 20))).light == "dark"
    assert measure(_flat((128, 128, 128))).light is None
    assert measure(_flat((128, 128, 128))).texture == "smooth"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    seen = measure(noise)
    assert (seen.texture, seen.plain, seen.background) == ("detailed", False, None)


def test_captions_say_the_class_and_now_and_then_what_is_seen() -> None:
    seen = Attributes("red", "white", True, "bright", "smooth")
    rng = np.random.default_rng(0)
    texts = [vary("apple", "fruit", (), "", seen, rng) for _ in range(200)]
    assert all("apple" in text for text in texts)
    for words in ("red apple", "white background", "bright", "smooth", "fruit"):
        assert 0 < sum(words in text for text in texts) < 140
    assert {vary("apple", None, (), "", NOTHING, rng) for _ in range(50)} > {"an apple", "a photo of an apple"}


def test_captions_by_people_come_first() -> None:
    rng = np.random.default_rng(0)
    texts = {vary("beach", None, ("Waves reach a beach.", "Sand."), "seen from above", NOTHING, rng) for _ in range(60)}
    assert texts == {
        "Waves reach a beach",
        "Sand",
        "Waves reach a beach, seen from above",
        "Sand, seen from above",
    }
