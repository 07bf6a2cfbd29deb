from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kka_ray import assets
from kka_ray.config.models import MaskConfig, RenderConfig
from kka_ray.errors import AssetError, ConfigError, ResourceError
from kka_ray.render.index import pipeline_identity
from kka_ray.render.masks import blob_mask
from kka_ray.render.renderer import DrawError, Renderer

pytestmark = pytest.mark.usefixtures("fake_text")

PIPELINES = ("flow_folder", "stable_diffusion", "stable_diffusion_3")


def load(folder: Path, **settings: Any) -> Renderer:
    return Renderer.load(RenderConfig(**{"pipeline": str(folder), "steps": 3, "dtype": "float32", **settings}))


def arrays(drawn: list[np.ndarray | DrawError]) -> np.ndarray:
    assert not [d for d in drawn if isinstance(d, DrawError)]
    return np.stack(drawn)  # type: ignore[arg-type]


def photographs(count: int, size: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]


@pytest.fixture(params=PIPELINES)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_any_pipeline_draws_by_seed_and_repeats(folder: Path) -> None:
    renderer = load(folder)
    texts, seeds = ["a red rose", "a red rose", "a car"], [1, 2, 1]
    images = arrays(renderer.draw(texts, seeds))
    assert images.shape == (3, 32, 32, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, arrays(renderer.draw(texts, seeds)))
    assert (images[0] != images[1]).mean() > 0.1
    assert (images[0] != images[2]).any()


@pytest.mark.parametrize("only", [True, False])
def test_weights_in_half_precision_are_loaded_where_there_are_no_others(
    stable_diffusion: Path, tmp_path: Path, only: bool
) -> None:
    """The marked files are the same weights where they are alone, and no weights at all beside the others."""
    folder = shutil.copytree(stable_diffusion, tmp_path / "pipeline")
    for file in folder.rglob("*.safetensors"):
        marked = file.with_name(f"{file.stem}.fp16.safetensors")
        if only:
            file.rename(marked)
        else:
            marked.touch()
    drawn, wanted = (arrays(load(path).draw(["a car"], [1])) for path in (folder, stable_diffusion))
    np.testing.assert_array_equal(drawn, wanted)


def test_image_to_image_keeps_more_of_the_photograph_at_a_small_strength(folder: Path) -> None:
    normals = photographs(2)
    kept = {}
    for strength in (0.1, 1.0):
        renderer = load(folder, mode="img2img", strength=strength, steps=10)
        assert renderer.size == (32, 32)
        kept[strength] = arrays(renderer.draw(["a rose", "a car"], [1, 2], normals)).astype(float)
    # Two photographs and one seed: what differs between the drawings comes from the photographs.
    swapped = normals[::-1]
    near = arrays(load(folder, mode="img2img", strength=0.1, steps=10).draw(["a rose", "a car"], [1, 2], swapped))
    far = arrays(load(folder, mode="img2img", strength=1.0, steps=10).draw(["a rose", "a car"], [1, 2], swapped))
    assert np.abs(kept[0.1] - near).mean() > np.abs(kept[1.0] - far).mean()


def test_pixels_outside_the_mask_are_the_photographs(folder: Path) -> None:
    normals, seeds = photographs(2, size=32), [5, 6]
    mask = MaskConfig(min_area=0.1, max_area=0.2)
    images = arrays(load(folder, mode="img2img", strength=0.9, mask=mask).draw(["a rose", "a car"], seeds, normals))
    for image, normal, seed in zip(images, normals, seeds, strict=True):
        inside = blob_mask(32, 32, seed, 0.1, 0.2)
        np.testing.assert_array_equal(image[~inside], normal[~inside])
        assert (image[inside] != normal[inside]).mean() > 0.5


def test_chunks_do_not_change_which_picture_is_whose(flow_folder: Path) -> None:
    texts, seeds = [f"text number {i}" for i in range(5)], list(range(5))
    whole = arrays(load(flow_folder, chunk=5).draw(texts, seeds)).astype(int)
    parts = arrays(load(flow_folder, chunk=2).draw(texts, seeds)).astype(int)
    assert np.abs(whole - parts).max() <= 1


def test_a_failing_text_does_not_lose_its_neighbours(flow_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = load(flow_folder)
    encode = renderer._pipeline.encode
    calls = []

    def failing(prompts: list[str]) -> Any:
        calls.append(len(prompts))
        if "poison" in prompts:
            raise ValueError("no such word")
        return encode(prompts)

    texts = ["a", "b", "c", "poison", "e", "f", "g", "h"]
    good = arrays(renderer.draw(["a"] * 8, range(8)))
    monkeypatch.setattr(renderer._pipeline, "encode", failing)
    drawn = renderer.draw(texts, range(8))
    assert [i for i, d in enumerate(drawn) if isinstance(d, DrawError)] == [3]
    assert drawn[3] == DrawError("ValueError: no such word")
    assert np.abs(arrays([drawn[0]])[0].astype(int) - good[0]).max() <= 1
    assert calls == [8, 4, 2, 2, 1, 1, 4]


def _spoil(renderer: Renderer, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    original = type(renderer._pipeline)._flow

    def spoiled(*arguments: Any, **settings: Any) -> torch.Tensor:
        images = original(renderer._pipeline, *arguments, **settings)
        images[1] = value
        return images

    monkeypatch.setattr(renderer._pipeline, "_flow", spoiled)


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "not finite"), (-1.0, "one colour"), (0.3, "one colour")])
def test_an_empty_picture_is_an_error_of_its_row(
    flow_folder: Path, monkeypatch: pytest.MonkeyPatch, value: float, said: str
) -> None:
    renderer = load(flow_folder)
    _spoil(renderer, monkeypatch, value)
    first, second, third = renderer.draw(["a", "b", "c"], [1, 2, 3])
    assert isinstance(first, np.ndarray)
    assert isinstance(third, np.ndarray)
    assert isinstance(second, DrawError)
    assert said in second.reason


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no memory")],
)
def test_lack_of_memory_is_no_fault_of_a_text(
    flow_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    renderer = load(flow_folder)
    apart = renderer.draw(["a"], [1]) + renderer.draw(["b"], [2])
    encode, room = renderer._pipeline.encode, 1

    def full(texts: list[str], *rest: Any, **named: Any) -> Any:
        if len(texts) > room:
            raise error
        return encode(texts, *rest, **named)

    monkeypatch.setattr(renderer._pipeline, "encode", full)
    drawn = renderer.draw(["a", "b"], [1, 2])
    assert all(np.array_equal(a, b) for a, b in zip(drawn, apart, strict=True))
    assert "render.chunk" in caplog.text
    room = 0
    with pytest.raises(ResourceError, match="not enough memory on cpu to draw a picture"):
        renderer.draw(["a", "b"], [1, 2])


def test_the_identity_of_a_pipeline_follows_its_own_files_and_the_text_encoder_that_it_names(
    flow_folder: Path, stable_diffusion: Path, tmp_path: Path
) -> None:
    other, encoder = tmp_path / "other", tmp_path / "encoder"
    shutil.copytree(flow_folder, other)
    encoder.mkdir()
    (encoder / "model.safetensors").write_bytes(b"one")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "text_encoder": str(encoder)}))
    assert pipeline_identity(str(stable_diffusion)) == assets.resolve(str(stable_diffusion)).identity
    found = pipeline_identity(str(other))
    assert found == pipeline_identity(str(other))
    (encoder / "model.safetensors").write_bytes(b"another")
    assets.resolve.cache_clear()
    assert pipeline_identity(str(other)) != found
    found = pipeline_identity(str(other))
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "shift": 2.0}))
    assets.resolve.cache_clear()
    assert pipeline_identity(str(other)) != found


def test_pickled_weights_are_refused(stable_diffusion: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(stable_diffusion, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(AssetError, match="safetensors"):
        load(folder)


def test_code_in_the_folder_is_not_run(flow_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    shutil.copytree(flow_folder, folder)
    touched = tmp_path / "touched"
    (folder / "mine.py").write_text(
        f"open({str(touched)!r}, 'w')\nfrom diffusers import DiffusionPipeline\nclass Mine(DiffusionPipeline): pass\n"
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["mine", "Mine"]}))
    with pytest.raises(AssetError, match="trust_remote_code"):
        load(folder)
    assert not touched.exists()


def test_what_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="no diffusers pipeline"):
        load(tmp_path)


def test_a_size_that_the_built_in_network_cannot_draw_is_refused_at_once(flow_folder: Path) -> None:
    with pytest.raises(ConfigError, match="32 x 32"):
        load(flow_folder, width=64)


def test_latent_pipelines_draw_the_configured_size(stable_diffusion: Path) -> None:
    assert arrays(load(stable_diffusion, width=48, height=64).draw(["a"], [1])).shape == (1, 64, 48, 3)


class _Qwen:
    """Called as Qwen-Image's pipeline is; draws grey noise of 32 px, whatever is asked."""

    def __init__(self, guidance_embeds: bool) -> None:
        self.transformer = SimpleNamespace(config=SimpleNamespace(guidance_embeds=guidance_embeds))
        self.given: dict[str, Any] = {}

    def __call__(
        self,
        prompt: list[str],
        negative_prompt: list[str] | None = None,
        true_cfg_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        **given: Any,
    ) -> SimpleNamespace:
        self.given = {"negative": negative_prompt, "true": true_cfg_scale, "scale": guidance_scale}
        return SimpleNamespace(images=np.random.default_rng(0).random((len(prompt), 32, 32, 3)))


def test_guidance_is_given_as_a_pipeline_reads_it() -> None:
    config = RenderConfig(pipeline="qwen", guidance=3.0)
    pipeline = _Qwen(guidance_embeds=False)
    arrays(Renderer(pipeline, config, "cpu", None).draw(["a", "b"], [1, 2]))
    assert pipeline.given == {"negative": [" ", " "], "true": 3.0, "scale": None}
    pipeline = _Qwen(guidance_embeds=True)
    arrays(Renderer(pipeline, config, "cpu", None).draw(["a"], [1]))
    assert pipeline.given == {"negative": None, "true": 4.0, "scale": 3.0}


def test_a_size_that_the_pipeline_rounds_is_refused() -> None:
    renderer = Renderer(_Qwen(True), RenderConfig(pipeline="qwen", width=40, height=32), "cpu", (32, 40))
    with pytest.raises(ConfigError, match="draws 32 x 32 px where 40 x 32 were asked for"):
        renderer.draw(["a", "b"], [1, 2])


def test_rows_must_match(flow_folder: Path) -> None:
    renderer = load(flow_folder)
    with pytest.raises(ValueError, match="seeds"):
        renderer.draw(["a", "b"], [1])
    with pytest.raises(ValueError, match="img2img"):
        renderer.draw(["a"], [1], photographs(1))
    assert renderer.draw([], []) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"mask": MaskConfig()},
        {"mode": "img2img", "steps": 2, "strength": 0.3},
        {"mode": "img2img", "mask": {"min_area": 0.5, "max_area": 0.2}},
    ],
)
def test_impossible_configurations_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RenderConfig(**settings)
