"""Tokens that see and draw more than their patch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from kka_ray.cluster.renderer import _network
from kka_ray.config.renderer import NetworkConfig, RendererConfig
from kka_ray.errors import ConfigError
from kka_ray.render.export import export_pipeline
from kka_ray.render.pipeline import KkaFlowPipeline
from kka_ray.render.training import Settings, Trainer
from kka_ray.render.transformer import FlowTransformer
from tests.render import tiny
from tests.render.test_training import data


def clean(network: FlowTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy, text = (torch.randn(shape, generator=generator) for shape in ((2, 3, 32, 32), (2, 4, 384)))
    return network(noisy, torch.tensor([0.2, 0.7]), text, torch.ones(2, 4, dtype=torch.bool))


def test_without_overlap_patches_lie_side_by_side() -> None:
    network, image = tiny.flow_transformer(), torch.randn(2, 3, 32, 32)
    patches = functional.pixel_unshuffle(image, 8).flatten(2).transpose(1, 2)
    assert torch.equal(network._to_patches(image), patches)
    assert torch.equal(network._to_image(patches, 32), image)


def test_a_wider_network_begins_as_the_narrow_one_and_draws_the_same() -> None:
    narrow = tiny.flow_transformer()
    for overlap in (1, 4, 11):  # the last reaches beyond the neighbours
        wide = narrow.overlapping(overlap)
        torch.testing.assert_close(clean(wide), clean(narrow), rtol=1e-4, atol=1e-5)
        again = wide.overlapping(overlap + 2)
        torch.testing.assert_close(clean(again), clean(narrow), rtol=1e-4, atol=1e-5)


def test_a_token_sees_and_draws_beyond_its_patch() -> None:
    network = tiny.flow_transformer(overlap=3)
    one = torch.zeros(1, 16, 3 * 14 * 14)
    one[0, 5] = 1.0  # the second patch of the second row
    drawn = network._to_image(one, 32)[0, 0]
    assert drawn.nonzero().min(0).values.tolist() == [5, 5]
    assert drawn.nonzero().max(0).values.tolist() == [18, 18]
    seen = network._to_patches(drawn.expand(1, 3, 32, 32))
    assert (seen[0].sum(1) > 0).sum() == 9, "its neighbours see what it drew"
    assert network._to_image(torch.ones(1, 16, 3 * 14 * 14), 32)[0, 0, 8].tolist() == [
        float(sum(8 * token - 3 <= pixel < 8 * token + 11 for token in range(4)) * 2) for pixel in range(32)
    ], "what several draw is added up"


def test_all_that_is_new_learns_and_is_kept(tmp_path: Path) -> None:
    wide = tiny.flow_transformer().overlapping(3)
    learner = Trainer(wide, Settings(steps=3, batch=16, warmup=0, learning_rate=3e-3))
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    for _ in range(3):
        learner.train_step(data())
    assert (wide.patch_out.weight != before["patch_out.weight"]).all()
    assert (wide.patch_in.weight != before["patch_in.weight"]).float().mean() > 0.99
    assert (wide.patch_out.bias != before["patch_out.bias"]).all()
    folder = export_pipeline(wide, tmp_path / "wide", "# card")
    loaded = KkaFlowPipeline.from_pretrained(folder, torch_dtype=torch.float32).transformer
    assert loaded.config.overlap == 3
    torch.testing.assert_close(clean(loaded), clean(wide.eval()), rtol=0, atol=0.02)


def test_a_training_gives_its_start_the_overlap_and_takes_none_away(tmp_path: Path) -> None:
    narrow = tiny.flow_transformer()
    sizes = {name: narrow.config[name] for name in NetworkConfig.model_fields}

    def begun(start: Path, overlap: int) -> FlowTransformer:
        given = {"sources": [{"kind": "flowers", "count": 8}], "training": {"steps": 1}, "name": "x"}
        return _network(RendererConfig(**given, network={**sizes, "overlap": overlap}, start=str(start)))

    start = export_pipeline(narrow, tmp_path / "narrow", "# card")
    wide = begun(start, 2)
    assert wide.config.overlap == 2
    assert wide.training
    torch.testing.assert_close(clean(wide), clean(begun(start, 0)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"has \{'overlap': 2\}; give `network` the same values"):
        begun(export_pipeline(wide, tmp_path / "wide", "# card"), 1)
