import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from kka_ray.describe.lora import merged_weights
from kka_ray.describe.vllm_sampler import VllmEngine
from kka_ray.errors import AssetError, StageError

IN, OUT, RANK = 6, 4, 2
LAYER = "transformer.h.0.attn.c_attn"


@pytest.fixture
def factors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(RANK, IN, generator=generator), torch.randn(OUT, RANK, generator=generator)


def adapter(folder: Path, factors: tuple[torch.Tensor, torch.Tensor], *, transposed: bool) -> Path:
    LoraConfig(r=RANK, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=transposed).save_pretrained(folder)
    down, up = factors
    prefix = f"base_model.model.{LAYER}"
    tensors = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("transposed", [False, True])
def test_the_change_lies_as_the_weight_does(
    tmp_path: Path, factors: tuple[torch.Tensor, torch.Tensor], transposed: bool
) -> None:
    raw = torch.ones((IN, OUT) if transposed else (OUT, IN))
    ((name, merged),) = merged_weights(adapter(tmp_path, factors, transposed=transposed), {f"{LAYER}.weight": raw}.get)
    inputs = torch.randn(3, IN, generator=torch.Generator().manual_seed(1))
    down, up = factors
    wanted = inputs @ (raw if transposed else raw.T) + 2 * (inputs @ down.T @ up.T)
    assert name == f"{LAYER}.weight"
    torch.testing.assert_close(inputs @ (merged if transposed else merged.T), wanted)


def test_vllm_merges_into_the_weights_that_the_model_is_loaded_from(
    tmp_path: Path, factors: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Repositories hold them again for other programs, under names of theirs."""
    change, name = adapter(tmp_path / "adapter", factors, transposed=False), f"{LAYER}.weight"
    engine = VllmEngine.__new__(VllmEngine)
    engine._path = tmp_path
    save_file({name: torch.ones(OUT, IN), "layers.0.attention.wq.weight": torch.ones(1)}, tmp_path / "all.safetensors")
    with pytest.raises(AssetError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        dict(engine._merged(change))
    save_file({name: torch.zeros(OUT, IN)}, tmp_path / "model.safetensors")
    merged = dict(engine._merged(change))
    assert merged.keys() == {name}
    torch.testing.assert_close(merged[name], 2 * factors[1] @ factors[0])
    save_file({"norm.weight": torch.ones(1)}, tmp_path / "first.safetensors")
    save_file({name: torch.ones(OUT, IN)}, tmp_path / "second.safetensors")
    index = {"weight_map": {"norm.weight": "first.safetensors", name: "second.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert dict(engine._merged(change)).keys() == {name, "norm.weight"}
    (tmp_path / "first.safetensors").unlink()
    with pytest.raises(AssetError, match=r"first\.safetensors is missing"):
        dict(engine._merged(change))


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path, factors: tuple[torch.Tensor, torch.Tensor]) -> None:
    folder = adapter(tmp_path, factors, transposed=False)
    with pytest.raises(StageError, match="changes transformer.h.0.attn.c_attn.weight by a matrix"):
        list(merged_weights(folder, {f"{LAYER}.weight": torch.ones(IN, OUT)}.get))
