from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from kka_ray.errors import ConfigError
from kka_ray.render.pipeline import KkaFlowPipeline
from kka_ray.render.training import CHECKPOINT, Settings, Trainer, TrainingData, rate_factor, train
from kka_ray.render.transformer import FlowTransformer
from tests.render import tiny


def data(rows: int = 16) -> TrainingData:
    """Each row is one flat colour under one text; state 0 of row i's first token is i."""
    rng = np.random.default_rng(0)
    images = np.broadcast_to(rng.integers(0, 256, (rows, 1, 1, 3), dtype=np.uint8), (rows, 32, 32, 3)).copy()
    states = torch.randn(4 * rows, 384, generator=torch.Generator().manual_seed(0)).half()
    states[::4, 0] = torch.arange(rows)
    captions = torch.arange(rows)
    return TrainingData(images, captions[:, None], states, 4 * captions, torch.full((rows,), 4))


def trainer(steps: int, **settings: float) -> Trainer:
    defaults = {"batch": 16, "warmup": 5, "learning_rate": 3e-3}
    return Trainer(tiny.flow_transformer(), Settings(steps=steps, **{**defaults, **settings}))  # type: ignore[arg-type]


def test_loss_falls_and_every_parameter_changes(tmp_path: Path) -> None:
    reports: list[dict[str, float]] = []
    learner = trainer(150)
    before = {name: p.detach().clone() for name, p in learner.network.named_parameters()}
    average = train(learner, data(), tmp_path, reports.append)
    assert [r["step"] for r in reports] == [50, 100, 150]
    assert reports[-1]["loss"] < 0.7 * reports[0]["loss"]
    assert [n for n, p in learner.network.named_parameters() if torch.equal(p, before[n])] == []
    assert average is learner.average
    assert not torch.equal(average.patch_in.weight, learner.network.patch_in.weight)


def test_the_average_follows_the_weights_slowly() -> None:
    learner = trainer(5, ema=0.3)
    want = {name: p.detach().clone() for name, p in learner.network.named_parameters()}
    for step in range(1, 6):
        learner.train_step(data())
        kept = min(0.3, (1 + step) / (10 + step))
        for name, p in learner.network.named_parameters():
            want[name] = kept * want[name] + (1 - kept) * p.detach()
    for name, p in learner.average.named_parameters():
        torch.testing.assert_close(p, want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fake_text")
def test_a_new_network_learns_two_colours_and_draws_them() -> None:
    """Flat pictures of two colours, under one text: whatever varies within a noisy one is its noise, 1 - time of it."""
    colours = np.array([[200, 40, 60], [30, 120, 220]], np.uint8)
    images = np.broadcast_to(colours[:, None, None], (2, 16, 16, 3)).copy()
    encoder: Any = tiny.FakeTextEncoder()
    encoded = TrainingData.encode(images, [("a tile",)] * 2, encoder, 8)
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2, "max_text_tokens": 8, "word_slots": 2}
    settings = Settings(steps=200, batch=32, warmup=20, learning_rate=3e-3, ema=0.98)
    learner = Trainer(FlowTransformer(**sizes), settings)
    seen: dict[str, list[torch.Tensor]] = {"learnt": [], "drawn": []}

    def watch(network: FlowTransformer, where: str) -> None:
        def note(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            noisy, time = inputs[:2]
            seen[where].append(torch.stack([time, noisy.std((2, 3)).mean(1)]))

        network.register_forward_pre_hook(note)

    watch(learner.network, "learnt")
    watch(learner.average, "drawn")
    while learner.step < settings.steps:
        learner.train_step(encoded)
    pipeline = KkaFlowPipeline(learner.average, FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(16)]
    drawn = pipeline(["a tile"] * 16, 10, guidance_scale=1.0, generator=generators, output_type="np").images

    distance = np.abs(255 * drawn[:, None] - colours[None, :, None, None].astype(float)).mean((2, 3, 4))
    assert distance.min(1).mean() < 10
    assert len(set(distance.argmin(1))) == 2
    for where in ("learnt", "drawn"):
        time, noise = torch.cat(seen[where], 1)
        assert float(time.min()) < 0.1
        assert float(time.max()) > 0.8
        torch.testing.assert_close(noise, 1 - time, rtol=0.2, atol=0.05, msg=where)


def test_a_resumed_training_repeats_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(8)
    train(whole, data(), tmp_path / "whole", lambda _: None)

    first = trainer(8, checkpoint_every=5)
    while first.step < 5:
        first.train_step(data())
    first.save(tmp_path / "parts")
    second = trainer(8)
    train(second, data(), tmp_path / "parts", lambda _: None)

    assert second.step == 8
    for part in ("network", "average"):
        want, got = getattr(whole, part).state_dict(), getattr(second, part).state_dict()
        assert all(torch.equal(want[name], got[name]) for name in want)


class _Recorder(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.rows: list[int] = []

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.rows += text[:, 0, 0].int().tolist()
        return self.network(noisy, time, text, mask)


def _rows(rank: int, world: int) -> list[int]:
    learner = Trainer(tiny.flow_transformer(), Settings(steps=1, batch=64), rank, world)
    recorder = _Recorder(learner.network)
    learner.train_step(data(1000), recorder)
    return recorder.rows


def test_ranks_share_one_batch_between_them() -> None:
    whole, first, second = _rows(0, 1), _rows(0, 2), _rows(1, 2)
    assert len(first) == len(second) == 32
    assert whole[0::2] == first
    assert whole[1::2] == second


def test_ranks_draw_different_noise() -> None:
    seen = []
    for rank in (0, 1):
        learner = Trainer(tiny.flow_transformer(), Settings(steps=1, batch=4, drop_text=0), rank, 2)
        learner.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].clone()))
        learner.train_step(data())
    assert not torch.equal(seen[0], seen[1])


def test_learning_rate_warms_up_holds_and_decays() -> None:
    settings = Settings(steps=1000, warmup=100, decay_from=0.5)
    assert rate_factor(0, settings) == pytest.approx(0.01)
    assert rate_factor(300, settings) == 1.0
    assert rate_factor(750, settings) == pytest.approx(0.505)
    assert rate_factor(1000, settings) == pytest.approx(0.01)


def test_data_is_found_again_only_if_it_was_made_of_the_same(tmp_path: Path) -> None:
    data().save(tmp_path / "data.safetensors", "flowers")
    assert TrainingData.load(tmp_path / "data.safetensors", "trees") is None
    assert TrainingData.load(tmp_path / "none.safetensors", "flowers") is None
    found = TrainingData.load(tmp_path / "data.safetensors", "flowers")
    assert found is not None
    assert np.array_equal(found.images, data().images)
    for part in ("captions", "states", "starts", "lengths"):
        assert torch.equal(getattr(found, part), getattr(data(), part))


def test_captions_are_encoded_once_and_stay_with_their_images() -> None:
    captions = [("a red rose", "a car"), ("a car", "a car"), ("one much longer caption than those", "a red rose")]
    encoder: Any = tiny.FakeTextEncoder()
    encoded = TrainingData.encode(np.zeros((3, 32, 32, 3), np.uint8), captions, encoder, 16)
    assert len(encoded.states) == 4 + 5 + 8
    for row, said in enumerate(captions):
        states, mask = encoded.text(encoded.captions[row])
        want, present = tiny.FakeTextEncoder().tokens(said)
        assert torch.equal(mask, present)
        torch.testing.assert_close(states, want, atol=2e-3, rtol=1e-3)


def test_each_caption_of_an_image_is_used() -> None:
    captions = [("red",), ("a blue car",)]
    encoder: Any = tiny.FakeTextEncoder()
    one_image = np.zeros((1, 32, 32, 3), np.uint8)
    encoded = TrainingData.encode(one_image, [tuple(text for row in captions for text in row)], encoder, 16)
    learner = Trainer(tiny.flow_transformer(), Settings(steps=1, batch=16, drop_text=0))
    masks: list[torch.Tensor] = []
    learner.network.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[3]))
    learner.train_step(encoded)
    assert set(masks[0].sum(1).tolist()) == {3, 5}


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    def learner(**identity: Any) -> Trainer:
        return Trainer(tiny.flow_transformer(), Settings(steps=2, batch=4), identity=identity)

    first = learner(batch=4, data="abc")
    first.train_step(data())
    first.save(tmp_path)
    with pytest.raises(ConfigError, match=r"batch was 4 and is 8, data differs\. .*another name"):
        train(learner(batch=8, data="def"), data(), tmp_path, lambda _: None)
    same = learner(batch=4, data="abc", added_since="x")
    same.load(tmp_path)
    assert same.step == 1

    # Of before identities were kept.
    save_file(load_file(tmp_path / CHECKPOINT), tmp_path / CHECKPOINT)
    old = learner(batch=8)
    old.load(tmp_path)
    assert old.step == 1


def test_the_identity_of_data_is_its_images_and_captions() -> None:
    encoder: Any = tiny.FakeTextEncoder()

    def identity(level: int, *captions: str) -> str:
        images = np.full((len(captions), 8, 8, 3), level, np.uint8)
        return TrainingData.encode(images, [(text,) for text in captions], encoder, 16).identity()

    assert identity(1, "a", "b") == identity(1, "a", "b")
    assert len({identity(1, "a", "b"), identity(2, "a", "b"), identity(1, "b", "a"), identity(1, "a b", "b")}) == 4


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    learner = trainer(3)
    with torch.no_grad():
        learner.network.patch_in.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(learner, data(), tmp_path, lambda _: None)
