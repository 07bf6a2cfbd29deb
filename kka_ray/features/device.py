"""Devices and the dtypes that they compute in."""

from __future__ import annotations

from typing import Literal

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic, so that it is faster than float32 there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compute_dtype(name: Literal["auto", "float32", "bfloat16", "float16"], device: torch.device) -> torch.dtype:
    """The dtype by name; `auto` is bfloat16 where the device has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return getattr(torch, name)
