"""A language model of a few thousand weights that reads bytes, and pairs for it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kka_ray.records import PreferencePair


def save_model(folder: Path) -> str:
    """Writes the model and its tokenizer; returns the reference."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, "</s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters) + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=len(letters),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def pairs(count: int) -> list[PreferencePair]:
    """Pairs over three prompts, no two with the same lines."""
    prompts = [f"Flowers:\n- a {kind}\n-" for kind in ("rose", "poppy", "lily")]
    return [
        PreferencePair(f"p{i % 3}", f"a{i}", f"b{i}", prompts[i % 3], f" {i} of them\n", f" {i} cars\n")
        for i in range(count)
    ]
