"""The renderers whose weights are shipped."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from kka_ray import assets
from kka_ray.config.models import RenderConfig
from kka_ray.render.domain import load_reference
from kka_ray.render.export import MAX_BYTES
from kka_ray.render.matching import Matcher
from kka_ray.render.renderer import Renderer

needs_models = pytest.mark.skipif(
    not all(map(assets.is_present, ("builtin:minilm-l6-v2", "builtin:efficientnet-lite0"))),
    reason="the built-in models are missing: run `kka setup`",
)


@pytest.mark.parametrize("name", assets.SHIPPED)
def test_a_shipped_renderer_is_small_and_says_how_it_came_about(name: str) -> None:
    folder = assets.SHIPPED[name]
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    assert {file.suffix for file in files} == {".json", ".md", ".safetensors"}
    card = (folder / "README.md").read_text()
    assert f"kka renderer train configs/renderer/{name}.yaml" in card
    reference = load_reference(folder)
    assert reference is not None
    assert len(reference.pooled) == 256


@needs_models
@pytest.mark.parametrize(("pipeline", "steps"), [("builtin:natural", 8), ("builtin:natural_fast", 3)])
def test_the_renderers_of_photographs_follow_the_text(pipeline: str, steps: int) -> None:
    """Their colours do, and their matchers tell texts apart by them."""
    texts = ["a photo of a red rose", "a photo of a ship on the blue sea"]
    renderer = Renderer.load(RenderConfig(pipeline=pipeline, steps=steps))
    rows = [texts[i % 2] for i in range(16)]
    drawn = renderer.draw(rows, list(range(16)))
    images = np.stack([image for image in drawn if isinstance(image, np.ndarray)]).astype(float)
    assert images.shape == (16, 32, 32, 3)
    redness = (images[..., 0] - images[..., 2]).mean((1, 2))
    assert redness[::2].mean() > redness[1::2].mean() + 30
    matcher = Matcher.load(pipeline)
    squares = [np.asarray(Image.fromarray(image.astype(np.uint8))) for image in images]
    own, other = matcher.match(squares, rows), matcher.match(squares, rows[1:] + rows[:1])
    assert own.mean() > other.mean() + 0.2
