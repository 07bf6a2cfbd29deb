from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kka_ray import assets
from kka_ray.config.models import MatchConfig
from kka_ray.errors import AssetError
from kka_ray.render import matching
from kka_ray.render.matching import FILE, Matcher, draw_matching, train_matcher
from kka_ray.render.renderer import DrawError
from kka_ray.render.training import TrainingData
from tests.render import tiny

WORDS = ["red", "blue", "green", "white", "black", "round", "square", "small"]


class FakeBackbone:
    """An image's features are its text's embedding, turned: which text is read from its first pixel."""

    identity = "fake"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.turn = torch.randn(384, 64, generator=generator) / 8
        self.encoder = tiny.FakeTextEncoder()

    def extract(self, images: Sequence[np.ndarray], patches: bool) -> SimpleNamespace:
        texts = [text(int(image[0, 0, 0])) for image in images]
        said = torch.cat([matching.pool(*self.encoder.tokens([t])) for t in texts])
        return SimpleNamespace(pooled=(said @ self.turn).numpy())


def text(number: int) -> str:
    return f"a {WORDS[number % 8]} and {WORDS[number // 8 % 8]} thing of {WORDS[number // 64 % 4]} kind"


def image(number: int) -> np.ndarray:
    return np.full((4, 4, 3), number, np.uint8)


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, max_tokens: int) -> Path:
    """A folder with a matcher of 200 images, one text each, out of 256."""
    backbone, encoder = FakeBackbone(), tiny.FakeTextEncoder()
    monkeypatch.setattr(matching, "TextEncoder", tiny.FakeTextEncoder)
    monkeypatch.setattr(matching.Backbone, "load", lambda *_: backbone)
    monkeypatch.setattr(assets, "resolve", lambda folder: SimpleNamespace(path=Path(folder)))
    rows = np.random.default_rng(0).permutation(256)
    pictures, texts = np.stack([image(i) for i in rows]), [[text(i)] for i in rows]
    data = TrainingData.encode(pictures, texts, encoder, max_tokens)  # type: ignore[arg-type]
    train_matcher(folder, data, list(range(200)), backbone, encoder, max_tokens)  # type: ignore[arg-type]
    (folder / "held_out").mkdir()
    np.save(folder / "held_out" / "rows.npy", rows[200:])
    return folder


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return train(tmp_path, monkeypatch, 16)


def test_images_of_one_caption_are_no_counterexamples_of_each_other() -> None:
    """With one caption for all there is nothing to tell apart, whatever the images are."""
    embedded, captions = torch.randn(1, 384), torch.zeros(12, 1, dtype=torch.long)
    weights = []
    for scale in (1.0, 2.0):
        pooled = scale * torch.randn(12, 8, generator=torch.Generator().manual_seed(int(scale)))
        weights.append(matching._fit(pooled, captions, embedded, torch.Generator().manual_seed(0)).state_dict())
    for name in ("image_in.weight", "text_in.0.weight"):
        assert torch.equal(weights[0][name], weights[1][name])


def test_images_match_their_own_texts_and_not_those_of_others(trained: Path) -> None:
    """On texts that were not seen, whose words were."""
    held_out = np.load(trained / "held_out" / "rows.npy").tolist()
    matcher = Matcher.load(str(trained))
    own = matcher.match([image(i) for i in held_out], [text(i) for i in held_out])
    others = matcher.match([image(i) for i in held_out], [text(i) for i in held_out[1:] + held_out[:1]])
    assert own.dtype == np.float32
    assert own.min() >= 0
    assert own.max() <= 1
    assert np.median(own) > 0.95
    assert 0.2 < np.median(others) < 0.8
    assert matcher.match([], []).shape == (0,)


def test_texts_are_read_as_far_as_in_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = Matcher.load(str(train(tmp_path, monkeypatch, 5)))  # "<s> a red and blue", the kind is not seen
    images, texts = [image(i) for i in range(64)], [text(i) for i in range(64)]
    ends = [t.replace("thing of", "toy of an unheard-of") for t in texts]
    assert np.array_equal(matcher.match(images, texts), matcher.match(images, ends))


def test_a_matcher_that_does_not_say_how_far_it_reads_reads_32_tokens(trained: Path) -> None:
    with safe_open(trained / FILE, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(trained / FILE)
    assert metadata.pop("max_tokens") == "16"
    save_file(tensors, trained / FILE, metadata)
    matcher = Matcher.load(str(trained))
    images, texts = [image(i) for i in range(64)], [text(i) + " really" * 28 for i in range(64)]
    inside, outside = ([t.rsplit(" ", n)[0] + " blue" * n for t in texts] for n in (6, 4))
    assert [len(t.split()) for t in (texts[0], inside[0], outside[0])] == [36] * 3
    assert np.array_equal(matcher.match(images, texts), matcher.match(images, outside))
    assert not np.array_equal(matcher.match(images, texts), matcher.match(images, inside))


def test_a_matcher_of_other_models_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackbone, "identity", "another")
    with pytest.raises(AssetError, match="another backbone"):
        Matcher.load(str(trained))


def test_a_damaged_or_missing_matcher_is_named(trained: Path) -> None:
    (trained / FILE).write_bytes(b"\x10\x00")
    with pytest.raises(AssetError, match="is damaged"):
        Matcher.load(str(trained))
    (trained / FILE).unlink()
    with pytest.raises(AssetError, match=f"has no {FILE}"):
        Matcher.load(str(trained))


class _Renderer:
    """Draws its seed; fails on the text `broken`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, Any]] = []

    def draw(
        self, texts: Sequence[str], seeds: Sequence[int], normals: Sequence[Any] | None
    ) -> list[np.ndarray | DrawError]:
        self.asked += list(zip(texts, seeds, normals or [None] * len(texts), strict=True))
        return [
            DrawError("no") if t == "broken" else np.array([[s]], np.int64) for t, s in zip(texts, seeds, strict=True)
        ]


class _Matcher:
    """Reads from a text the match of its first, second, ... picture."""

    def match(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        attempts = [int(image[0, 0]) // matching._REDRAW for image in images]
        return np.array([float(t.split()[a]) for t, a in zip(texts, attempts, strict=True)], np.float32)


def test_only_what_falls_short_is_drawn_again_and_the_best_is_kept() -> None:
    renderer = _Renderer()
    texts = ["0.95 0 0", "0.1 0.92 0", "0.3 0.5 0.4", "broken", "0.0 0.0 0.0"]
    config = MatchConfig(least=0.9, redraws=2)
    normals = [f"n{i}" for i in range(5)]
    drawn = draw_matching(renderer, _Matcher(), config, texts, [0, 1, 2, 3, 4], normals)  # type: ignore[arg-type]
    step = matching._REDRAW
    assert [d.seed for d in drawn] == [0, 1 + step, 2 + step, 3, 4]
    assert [d.match if d.match is None else round(d.match, 2) for d in drawn] == [0.95, 0.92, 0.5, None, 0.0]
    assert drawn[3].image == DrawError("no")
    assert all(d.image == [[d.seed]] for i, d in enumerate(drawn) if i != 3)
    assert [(t, s // step, n) for t, s, n in renderer.asked[5:]] == [
        (texts[1], 1, "n1"),
        (texts[2], 1, "n2"),
        (texts[4], 1, "n4"),
        (texts[2], 2, "n2"),
        (texts[4], 2, "n4"),
    ]


def test_without_redraws_images_are_only_marked() -> None:
    renderer = _Renderer()
    drawn = draw_matching(renderer, _Matcher(), MatchConfig(least=0.9, redraws=0), ["0.1", "0.99"], [5, 6])  # type: ignore[arg-type]
    assert [d.seed for d in drawn] == [5, 6]
    assert len(renderer.asked) == 2
