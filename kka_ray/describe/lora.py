"""LoRA adapters (Hu et al., 2022) merged into the weights they touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from kka_ray.errors import StageError


def merged_weights(folder: Path, base: Callable[[str], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """(name, base weight + scale x B A) of every weight that an adapter in PEFT's format changes.

    `base(name)` is the weight of the raw base model, (out, in), or (in, out) where the adapter says `fan_in_fan_out`;
    None if it has none of that name. The sum is worked out in float32 and rounded to the base weight's dtype. Raises
    StageError if the adapter does not fit the model.
    """
    config = LoraConfig.from_pretrained(str(folder))
    scale = config.lora_alpha / config.r
    adapter = load_file(folder / "adapter_model.safetensors")
    downs = [k for k in adapter if k.endswith(".lora_A.weight")]
    if not downs:
        raise StageError(f"{folder} holds no LoRA weights")
    for key in downs:
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        raw = base(name)
        if raw is None:
            raise StageError(f"the adapter {folder} changes {name}, which this model does not have")
        delta = scale * (adapter[key.replace(".lora_A.", ".lora_B.")].float() @ adapter[key].float())
        if config.fan_in_fan_out:
            delta = delta.T
        if delta.shape != raw.shape:
            raise StageError(
                f"the adapter {folder} changes {name} by a matrix of {tuple(delta.shape)}, and here it is one of "
                f"{tuple(raw.shape)}"
            )
        yield name, (raw.float() + delta.to(raw.device)).to(raw.dtype)
