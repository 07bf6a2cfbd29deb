"""Sentence and token embeddings by all-MiniLM-L6-v2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from kka_ray import assets

DEFAULT = "builtin:minilm-l6-v2"
WIDTH = 384
"""Width of MiniLM's embeddings."""


class TextEncoder:
    """MiniLM: mean-pooled sentence embeddings and token states. Frozen, in float32 unless told otherwise."""

    def __init__(self, reference: str = DEFAULT, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        model = assets.resolve(reference)
        self.identity = model.identity
        self.device = torch.device(device)
        self._tokenizer = AutoTokenizer.from_pretrained(model.path)
        network = AutoModel.from_pretrained(model.path, dtype=dtype, add_pooling_layer=False)
        self._network = network.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def tokens(self, texts: Sequence[str], max_tokens: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states (N, T, 384), zero where padded, and the mask (N, T), bool; T <= `max_tokens`."""
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(self.device)
        states = self._network(**batch).last_hidden_state
        mask = batch["attention_mask"].bool()
        return states * mask[..., None], mask

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """L2-normalised sentence embeddings, float32 (N, 384); an empty list gives (0, 384).

        Texts are embedded in order of length, so that a batch holds little padding; the order of the result is that
        of `texts`.
        """
        out = np.zeros((len(texts), WIDTH), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            states, mask = self.tokens([texts[i] for i in rows], max_tokens=128)
            out[rows] = pool(states, mask).float().cpu().numpy()
        return out


def pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the token states (N, T, D) under the mask (N, T), L2-normalised: the sentence embedding (N, D)."""
    weights = mask[..., None].to(states.dtype)
    mean = (states * weights).sum(1) / weights.sum(1).clamp_min(1)
    return torch.nn.functional.normalize(mean, dim=-1)
