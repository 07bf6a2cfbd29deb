"""A training that breaks off goes on where it was, with the result of one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from kka_ray.config.models import PreferenceConfig
from kka_ray.preference import dpo
from tests.preference.tiny import pairs, save_model

CONFIG = PreferenceConfig(steps=24, batch=4, micro_batch=2, warmup=2, learning_rate=1e-2, lora_dropout=0.1)


class Kept:
    """Checkpoints in memory; the training breaks off when one number of them is written."""

    def __init__(self, breaks_at: int = 0) -> None:
        self.contents: list[bytes] = []
        self.breaks_at = breaks_at

    def read(self, name: str) -> bytes | None:
        return self.contents[-1] if self.contents else None

    def write(self, name: str, content: bytes) -> None:
        self.contents.append(content)
        if len(self.contents) == self.breaks_at:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """So small a model is computed more slowly by several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def train(
    folder: Path, model: str, kept: Kept | None, previous: Path | None = None, **settings: Any
) -> tuple[dpo.DpoResult, dict[str, torch.Tensor]]:
    config = CONFIG.model_copy(update=settings)
    result = dpo.train_dpo(
        pairs(7), model, previous, config, 3, folder / "adapter", folder / "work", cpu=True, checkpoints=kept
    )
    return result, load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(("batch", "breaks_at"), [pytest.param(2, 1, marks=pytest.mark.slow), (2, 2), (4, 1)])
@pytest.mark.parametrize("reference", ["base", "previous"])
def test_a_training_goes_on_bit_for_bit(tmp_path: Path, model: str, batch: int, breaks_at: int, reference: str) -> None:
    """An epoch has four steps, or two: the first checkpoint, after ten steps, lies within one or at its end."""
    train(tmp_path / "first", model, None, steps=3)
    settings = {"batch": batch, "reference": reference, "previous": tmp_path / "first" / "adapter"}
    whole, wanted = train(tmp_path / "whole", model, None, **settings)
    kept = Kept(breaks_at)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", model, kept, **settings)
    assert len(kept.contents) == breaks_at
    resumed, found = train(tmp_path / "resumed", model, kept, **settings)
    assert len(kept.contents) == 2, "steps before the checkpoint are not repeated, and the last step has none"
    assert resumed == whole
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".pth", ".bin")]


def test_a_training_that_keeps_checkpoints_has_the_result_of_one_that_does_not(tmp_path: Path, model: str) -> None:
    whole, wanted = train(tmp_path / "without", model, None, steps=12)
    kept = Kept()
    with_checkpoints, found = train(tmp_path / "with", model, kept, steps=12)
    assert with_checkpoints == whole
    assert whole.margin > 0
    assert whole.history[-1]["accuracy"] > 0.5
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    (content,) = kept.contents
    assert {name.split(".")[0] for name in load(content)} == {"adapter", "optimizer", "random", "reference"}


def test_the_dropout_of_an_adapter_takes_part(tmp_path: Path, model: str) -> None:
    (without, _), (with_it, _) = (
        train(tmp_path / str(share), model, None, steps=3, lora_dropout=share) for share in (0.0, 0.5)
    )
    assert with_it.history[0] == without.history[0], "an adapter begins as nothing, whatever is dropped of its input"
    assert with_it.history[1:] != without.history[1:]


def test_the_reference_drops_nothing(tmp_path: Path, model: str) -> None:
    """It is read once and kept: one draw of its dropout would be in every margin."""
    train(tmp_path / "first", model, None, steps=3)
    found = []
    for share in (0.0, 0.5):
        kept, settings = Kept(), {"reference": "previous", "previous": tmp_path / "first" / "adapter"}
        train(tmp_path / str(share), model, kept, steps=12, lora_dropout=share, **settings)
        found.append(load(kept.contents[0])["reference.0"])
    assert torch.equal(*found)
