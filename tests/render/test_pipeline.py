from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from kka_ray import assets
from kka_ray.errors import AssetError
from kka_ray.render import export
from kka_ray.render.export import export_pipeline
from kka_ray.render.pipeline import KkaFlowPipeline
from tests.render import tiny

pytestmark = pytest.mark.usefixtures("fake_text")


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def pipeline() -> KkaFlowPipeline:
    pipeline = tiny.flow_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: KkaFlowPipeline, prompts: list[str], seeds: tuple[int, ...], **settings: object) -> np.ndarray:
    settings = {"num_inference_steps": 3, "output_type": "np", **settings}
    return pipeline(prompts, generator=generators(*seeds), **settings).images  # type: ignore[arg-type]


def photograph(seed: int = 0, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_the_same_call_repeats_bit_for_bit(pipeline: KkaFlowPipeline) -> None:
    first = draw(pipeline, ["a red rose", "a car"], (1, 2))
    assert first.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(first, draw(pipeline, ["a red rose", "a car"], (1, 2)))


def test_seed_and_prompt_each_change_the_image(pipeline: KkaFlowPipeline) -> None:
    base = draw(pipeline, ["a red rose"], (1,))
    assert np.abs(base - draw(pipeline, ["a red rose"], (2,))).mean() > 0.01
    assert np.abs(base - draw(pipeline, ["two blue cars"], (1,))).mean() > 0.001


def test_neighbours_do_not_change_an_image(pipeline: KkaFlowPipeline) -> None:
    alone = draw(pipeline, ["a rose"], (7,))[0]
    longer = "many words make the texts of a batch longer than this one"
    among = draw(pipeline, [longer, "a car", "a rose"], (1, 2, 7))[2]
    # Rounding in bfloat16 may depend on the batch; a level of 255 is 0.004.
    np.testing.assert_allclose(alone, among, atol=0.02)
    assert np.abs(alone - among).mean() < 0.002


def test_equal_prompts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, asked = tiny.flow_pipeline(), []
    one_by_one = [pipeline.encode([prompt]) for prompt in ("a rose", "two cars", "a rose")]
    tokens = pipeline._encoder.tokens  # type: ignore[union-attr]

    def counted(texts: list[str], max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        asked.extend(texts)
        return tokens(texts, max_tokens)

    monkeypatch.setattr(pipeline._encoder, "tokens", counted)
    text, mask = pipeline.encode(["a rose", "two cars", "a rose"])
    assert asked == ["a rose", "two cars"]
    for row, (states, present) in enumerate(one_by_one):
        assert torch.equal(text[row], states[0])
        assert torch.equal(mask[row], present[0])


def test_guidance_one_is_the_conditional_flow(pipeline: KkaFlowPipeline) -> None:
    plain = draw(pipeline, ["a rose"], (1,), guidance_scale=1.0)
    nearly = draw(pipeline, ["a rose"], (1,), guidance_scale=1.0001)
    assert np.abs(plain - nearly).mean() < 0.002
    assert np.abs(plain - draw(pipeline, ["a rose"], (1,), guidance_scale=4.0)).mean() > 0.001


def test_one_step_is_the_networks_clean_image(pipeline: KkaFlowPipeline) -> None:
    # From pure noise a single Euler step lands on what the network predicts: the sign and scale of the velocity hold.
    got = draw(pipeline, ["a rose"], (1,), num_inference_steps=1, guidance_scale=1.0)[0]
    noise = torch.randn(1, 3, 32, 32, generator=generators(1)[0])
    text, mask = pipeline.encode(["a rose"])
    with torch.no_grad():
        clean = pipeline.transformer(noise, torch.zeros(1), text, mask)[0]
    want = (clean / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got, want, atol=0.03)


def test_a_perfect_network_lands_on_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny.flow_pipeline()
    target = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    times: list[float] = []

    def perfect(noisy: torch.Tensor, time: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        times.append(float(time[0]))
        return target.expand_as(noisy)

    monkeypatch.setattr(pipeline.transformer, "forward", perfect)
    image = draw(pipeline, ["a rose"], (1,), num_inference_steps=5)[0]
    np.testing.assert_allclose(image, (target[0] / 2 + 0.5).permute(1, 2, 0).numpy(), atol=1e-5)
    np.testing.assert_allclose(times, [0.0, 0.2, 0.4, 0.6, 0.8], atol=1e-6)

    times.clear()
    draw(pipeline, ["a rose"], (1,), num_inference_steps=5, image=[photograph()], strength=0.4)
    np.testing.assert_allclose(times, [0.6, 0.8], atol=1e-6)


def test_the_second_order_comes_nearer_to_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the best network for one Gaussian, whose flow is known: sd(sigma) from sd(1) = 1 to sd(0) = 0.25."""
    first, second = (tiny.flow_pipeline() for _ in range(2))
    second = KkaFlowPipeline(second.transformer, second.scheduler, second_order=True)

    def best(noisy: torch.Tensor, time: torch.Tensor, *_: object) -> torch.Tensor:
        at = time[:, None, None, None]
        return at * 0.25**2 / (at**2 * 0.25**2 + (1 - at) ** 2) * noisy

    errors = []
    for pipe in (first, second):
        pipe.set_progress_bar_config(disable=True)
        pipe.autocast_dtype = torch.float32
        monkeypatch.setattr(pipe.transformer, "forward", best)
        drawn = draw(pipe, ["x"], (3,), num_inference_steps=6, guidance_scale=1.0)[0] * 2 - 1
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(3)).permute(1, 2, 0).numpy()
        errors.append(np.abs(drawn - 0.25 * noise).mean())
    assert errors[1] < 0.75 * errors[0]


def test_a_shifted_schedule_begins_at_the_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.flow_pipeline()
    pipe = KkaFlowPipeline(pipe.transformer, FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    draw(pipe, ["x"], (0,), image=[photograph()], strength=0.5, num_inference_steps=8)
    sigmas = pipe.scheduler.sigmas.tolist()
    assert len(sigmas) == 5
    assert sigmas[0] == pytest.approx(0.5)
    assert sigmas[0] - sigmas[1] < sigmas[-2] - sigmas[-1], "more steps where there is much noise"


def test_a_small_strength_stays_near_the_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny.flow_pipeline()
    # A network that finds nothing to change: what is left is the noise that was mixed into the photograph.
    monkeypatch.setattr(pipeline.transformer, "forward", lambda noisy, *_: noisy)
    image = photograph()
    distance = {}
    for strength in (0.05, 0.5, 1.0):
        drawn = draw(pipeline, ["a rose"], (1,), image=[image], strength=strength)[0]
        distance[strength] = np.abs(drawn - np.asarray(image) / 255).mean()
    assert distance[0.05] < 0.05
    assert 0.15 < distance[0.5] < distance[1.0]


def test_strength_one_forgets_the_photograph(pipeline: KkaFlowPipeline) -> None:
    fresh = draw(pipeline, ["a rose"], (1,))
    np.testing.assert_array_equal(fresh, draw(pipeline, ["a rose"], (1,), image=[photograph()], strength=1.0))


def test_pixels_outside_the_mask_are_the_photographs(pipeline: KkaFlowPipeline) -> None:
    image, mask = photograph(), np.zeros((32, 32), bool)
    mask[8:20, 4:16] = True
    masks = [Image.fromarray(mask.astype(np.uint8) * 255)]
    drawn = draw(pipeline, ["a rose"], (1,), image=[image], mask_image=masks, strength=0.9)[0]
    pixels = np.rint(drawn * 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels[~mask], np.asarray(image)[~mask])
    assert (pixels[mask] != np.asarray(image)[mask]).mean() > 0.5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"strength": 0.0}, "strength"),
        ({"mask_image": [photograph()]}, "needs image"),
        ({"height": 64, "width": 64}, "32 x 32"),
        ({"image": [photograph(), photograph()]}, "2 images for 1 prompts"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    pipeline: KkaFlowPipeline, settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        draw(pipeline, ["a rose"], (1,), **settings)


def test_saved_pipeline_holds_no_text_encoder_and_draws_the_same(pipeline: KkaFlowPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "p")
    assert {f.name for f in (tmp_path / "p").iterdir()} == {"model_index.json", "transformer", "scheduler"}
    assert not list(tmp_path.rglob("*.bin"))
    loaded = KkaFlowPipeline.from_pretrained(tmp_path / "p")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(pipeline, ["a rose"], (1,)), draw(loaded, ["a rose"], (1,)))


def test_diffusers_loads_the_folder_in_a_fresh_process(flow_folder: Path) -> None:
    code = (
        "import kka_ray.render.pipeline, sys\n"
        "from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "print(type(pipeline).__name__, pipeline.transformer.config.width, pipeline.config.text_encoder)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(flow_folder)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["KkaFlowPipeline", "32", "builtin:minilm-l6-v2"]


def test_export_writes_half_precision_with_a_card(pipeline: KkaFlowPipeline, tmp_path: Path) -> None:
    export_pipeline(pipeline.transformer, tmp_path / "e", "# A card\n")
    assert (tmp_path / "e" / "README.md").read_text() == "# A card\n"
    weights = load_file(tmp_path / "e" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert pipeline.transformer.dtype == torch.float32
    index = json.loads((tmp_path / "e" / "model_index.json").read_text())
    assert index["transformer"] == ["kka_ray.render.transformer", "FlowTransformer"]
    loaded = KkaFlowPipeline.from_pretrained(tmp_path / "e", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.second_order
    scheduler = FlowMatchEulerDiscreteScheduler(shift=export.SHIFT)
    same = KkaFlowPipeline(pipeline.transformer, scheduler, second_order=True)
    same.set_progress_bar_config(disable=True)
    assert np.abs(draw(same, ["a rose"], (1,)) - draw(loaded, ["a rose"], (1,))).mean() < 0.01


def test_export_refuses_what_is_too_large(
    pipeline: KkaFlowPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_BYTES", 10_000)
    with pytest.raises(AssetError, match="MiB"):
        export_pipeline(pipeline.transformer, tmp_path / "e", "card")
    assert list(tmp_path.iterdir()) == []


def test_weights_do_not_tell_the_folder_that_they_once_lay_in(pipeline: KkaFlowPipeline, tmp_path: Path) -> None:
    first = export_pipeline(pipeline.transformer, tmp_path / "first", "card")
    again = export_pipeline(KkaFlowPipeline.from_pretrained(first).transformer, tmp_path / "second", "card")
    for folder in (again, *assets.SHIPPED.values()):
        assert "_name_or_path" not in json.loads((folder / "transformer" / "config.json").read_text())


def test_minilm_texts_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if not assets.is_present("builtin:minilm-l6-v2"):
        pytest.skip("MiniLM is not installed: run `kka setup`")
    pipeline = tiny.flow_pipeline()
    alone, mask = pipeline.encode(["a rose"])
    among, _ = pipeline.encode(["a text of rather more words than the other one", "a rose"])
    assert alone.shape == (1, 16, 384)
    assert int(mask.sum()) == 4
    torch.testing.assert_close(alone[0], among[1], rtol=0, atol=0)
