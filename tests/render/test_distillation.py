from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from kka_ray.cluster.renderer import _network
from kka_ray.config.models import RenderConfig
from kka_ray.config.renderer import NetworkConfig, RendererConfig
from kka_ray.errors import ConfigError
from kka_ray.render.distillation import Teacher
from kka_ray.render.export import draw_samples, export_pipeline
from kka_ray.render.index import check_renderer
from kka_ray.render.pipeline import SHIFT, KkaFlowPipeline, noise_levels
from kka_ray.render.renderer import Renderer
from kka_ray.render.training import Settings, Trainer, TrainingData
from kka_ray.render.transformer import FlowTransformer
from tests.render import tiny

pytestmark = pytest.mark.usefixtures("fake_text")
TEXTS = ["a red rose", "two blue cars"]


def teacher(guidance: float = 2.5) -> Teacher:
    return Teacher(tiny.flow_transformer(), guidance=guidance, steps=2, substeps=3)


def noise() -> torch.Tensor:
    return torch.cat([torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])


def draw(network: FlowTransformer, steps: int, guidance: float, *, second_order: bool) -> torch.Tensor:
    """The pictures (2, 3, 32, 32) that the pipeline makes of `noise()`, in 0..1 and float32."""
    pipeline = KkaFlowPipeline(network, FlowMatchEulerDiscreteScheduler(shift=SHIFT), second_order=second_order)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.autocast_dtype = torch.float32
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    settings: dict[str, Any] = {"generator": generators, "output_type": "pt", "return_dict": False}
    return pipeline(TEXTS, steps, guidance, **settings)[0]


def test_the_images_lead_in_a_few_steps_to_where_many_guided_ones_end() -> None:
    guide = teacher()
    text, mask = tiny.FakeTextEncoder().tokens(TEXTS)
    states, times, images = guide(noise(), text, mask)
    assert states.shape == images.shape == (4, 3, 32, 32)
    sigmas = noise_levels(FlowMatchEulerDiscreteScheduler(shift=SHIFT), 2)
    assert times.tolist() == pytest.approx([0, 0, 1 - sigmas[1], 1 - sigmas[1]])
    torch.testing.assert_close(states[:2], noise())
    kept = sigmas[1] / sigmas[0]
    torch.testing.assert_close(states[2:], kept * states[:2] + (1 - kept) * images[:2])
    many = draw(guide.network, 6, 2.5, second_order=True)
    torch.testing.assert_close((images[2:] / 2 + 0.5).clamp(0, 1), many, atol=2e-4, rtol=0)


def test_a_student_learns_to_draw_in_two_steps_what_its_teacher_draws_in_six() -> None:
    guide = teacher()
    encoder: Any = tiny.FakeTextEncoder()
    data = TrainingData.encode(np.zeros((2, 32, 32, 3), np.uint8), [(text,) for text in TEXTS], encoder, 16)
    settings = Settings(steps=150, batch=16, warmup=5, learning_rate=1e-3, matrix_rate=0.01, drop_text=0, ema=0.9)
    learner = Trainer(tiny.flow_transformer(), settings, teacher=guide)
    wanted = draw(guide.network, 6, 2.5, second_order=True)

    def error() -> float:
        return float((draw(learner.average, 2, 1.0, second_order=False) - wanted).square().mean())

    before = error()
    while learner.step < settings.steps:
        learner.train_step(data)
    assert error() < 0.3 * before
    assert torch.equal(guide.network.patch_in.weight, tiny.flow_transformer().patch_in.weight), "the teacher stays"


def test_a_distilled_network_draws_as_it_was_distilled_and_in_no_other_way(tmp_path: Path) -> None:
    export_pipeline(tiny.flow_transformer(), tmp_path / "fast", "# card", teacher(3.0))
    config = {"pipeline": str(tmp_path / "fast"), "steps": 2, "guidance": 3.0, "dtype": "float32"}
    renderer = Renderer.load(RenderConfig(**config), threads=1)
    rows: list[int] = []
    renderer._pipeline.transformer.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    (first, second) = renderer.draw(TEXTS, [1, 2])
    assert rows == [2, 2], "one evaluation a step"
    plain = draw(tiny.flow_transformer(), 2, 1.0, second_order=False).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack([first, second]) / 255 - plain).max() < 0.01
    half = Renderer.load(RenderConfig(**config | {"dtype": "bfloat16"}), threads=1)
    assert half._pipeline.transformer.dtype == torch.bfloat16
    rounded = np.stack(half.draw(TEXTS, [1, 2])).astype(int)  # type: ignore[arg-type]
    assert 0 < np.abs(rounded - np.stack([first, second]).astype(int)).mean() < 2
    its_own = Renderer.load(RenderConfig(**config | {"guidance": None}), threads=1).draw(TEXTS, [1, 2])
    assert np.array_equal(its_own, [first, second])
    for other in ({"steps": 3}, {"guidance": 4.0}, {"mode": "img2img"}):
        with pytest.raises(ConfigError, match=r"distilled .*render\.steps"):
            Renderer.load(RenderConfig(**config | other), threads=1)
        with pytest.raises(ConfigError, match=r"distilled .*render\.steps"):
            check_renderer(RenderConfig(**config | other))
    check_renderer(RenderConfig(**config))
    samples = draw_samples(tiny.flow_transformer(), ["a red rose"], teacher())
    assert samples.size == (8 * 32, 32)


def test_a_network_that_was_distilled_is_no_start(tmp_path: Path) -> None:
    fast = export_pipeline(tiny.flow_transformer(), tmp_path / "fast", "# card", teacher(3.0))
    network = {name: tiny.flow_transformer().config[name] for name in NetworkConfig.model_fields}
    sources = [{"kind": "flowers", "count": 8}]
    given = {"name": "x", "sources": sources, "network": network, "training": {"steps": 1}, "start": str(fast)}
    with pytest.raises(ConfigError, match=r"start: .*fast was distilled"):
        _network(RendererConfig.model_validate(given))


def test_half_of_what_says_how_a_network_was_distilled_is_refused(tmp_path: Path) -> None:
    pipeline = KkaFlowPipeline(
        tiny.flow_transformer(), FlowMatchEulerDiscreteScheduler(shift=SHIFT), distilled_guidance=2.5
    )
    with pytest.raises(ValueError, match="the pipeline has one"):
        pipeline(TEXTS, 2, 2.5)
