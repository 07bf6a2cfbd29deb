"""Sampling with transformers: each prompt is read once, its cache shared by all of its samples, and finished rows leave
the batch. Repeats bit for bit for the same prompts, count, seed, dtype and thread count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.cache_utils import DynamicCache

from kka_ray import assets
from kka_ray.config.models import DescribeConfig, TransformersSampler
from kka_ray.describe.lora import merged_weights
from kka_ray.describe.sampler import mixed
from kka_ray.errors import ConfigError
from kka_ray.features.device import compute_dtype


class TransformersEngine:
    """A causal language model on one device. See `kka_ray.describe.sampler.Sampler`."""

    def __init__(self, config: DescribeConfig, device: str = "cpu") -> None:
        engine = config.sampler
        if not isinstance(engine, TransformersSampler):
            raise TypeError(f"expected a transformers sampler, got {engine.kind}")
        self.config = config
        self.batch = engine.batch
        self.device = torch.device(device)
        self.dtype = compute_dtype(engine.dtype, self.device)
        model = assets.resolve(engine.model)
        self.tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=engine.trust_remote_code)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(
            model.path, dtype=self.dtype, trust_remote_code=engine.trust_remote_code, use_safetensors=True
        )
        _check_cache(self.model.config, engine.model)
        self.model.eval().requires_grad_(False).to(self.device)
        self._raw: dict[str, Tensor] = {}
        self._eos = self._text_ends()
        self._ends = self._line_ends()

    def load_adapter(self, folder: Path | None) -> None:
        """Merges a LoRA adapter into the weights it touches; what another adapter changed is put back first.

        Raises StageError if the adapter names weights that the model does not have.
        """
        weights = dict(self.model.named_parameters())
        for name, raw in self._raw.items():
            weights[name].copy_(raw)
        self._raw = {}
        if folder is None:
            return
        for name, merged in merged_weights(folder, weights.get):
            # Off the device: beside the model there may be no room for its weights again.
            self._raw[name] = weights[name].detach().to("cpu", copy=True)
            weights[name].copy_(merged)

    def take_usage(self) -> dict[str, int]:
        """Nothing was asked of a service."""
        return {}

    def sleep(self) -> None:
        """Nothing is given back."""

    @torch.inference_mode()
    def sample(self, prompts: Sequence[str], count: int, seed: int) -> list[list[str]]:
        """`count` completions for each prompt, in batches of whole prompts of about the same length.

        More completions of one prompt than `batch` are drawn in several batches.
        """
        at_once = min(count, self.batch)
        per_batch = self.batch // at_once
        lengths = [len(ids) for ids in self.tokenizer(list(prompts))["input_ids"]]
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        out: list[list[str]] = [[] for _ in prompts]
        for start in range(0, len(prompts), per_batch):
            part = order[start : start + per_batch]
            generator = torch.Generator().manual_seed(mixed(seed, start))
            for first in range(0, count, at_once):
                texts = [prompts[i] for i in part]
                batch = self._sample_batch(texts, min(at_once, count - first), generator)
                for i, lines in zip(part, batch, strict=True):
                    out[i] += lines
        return out

    def _sample_batch(self, prompts: list[str], count: int, generator: torch.Generator) -> list[list[str]]:
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)
        cache = DynamicCache(config=self.model.config)
        mask = batch["attention_mask"]
        position = mask.cumsum(-1) - 1
        logits = self.model(
            batch["input_ids"],
            attention_mask=mask,
            position_ids=position.clamp_min(0),
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.batch_repeat_interleave(count)
        logits, mask = logits.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
        position = position[:, -1:].repeat_interleave(count, 0)

        rows = torch.arange(len(prompts) * count)
        written: list[list[int]] = [[] for _ in rows]
        for _ in range(self.config.max_tokens):
            # One number for every row, present or gone: what a row draws does not depend on when others end.
            uniform = torch.rand(len(written), generator=generator)[rows].to(self.device)
            tokens = _nucleus(logits.float() / self.config.temperature, self.config.top_p, uniform)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                written[row].append(token)
            alive = ~self._ends[tokens].cpu()
            if not alive.any():
                break
            if not alive.all():
                keep = alive.nonzero()[:, 0]
                rows, there = rows[keep], keep.to(self.device)
                tokens, mask, position = tokens[there], mask[there], position[there]
                cache.batch_select_indices(there)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = position + 1
            logits = self.model(
                tokens[:, None], attention_mask=mask, position_ids=position, past_key_values=cache
            ).logits[:, -1]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        # The end of the text is the end of its line.
        texts = [text + "\n" * (row[-1] in self._eos) for text, row in zip(texts, written, strict=True)]
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    @torch.inference_mode()
    def log_probs(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[float]]:
        """Log-probabilities of the completions' tokens. A prompt that has several completions is read once."""
        rows_of: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            rows_of.setdefault(prompt, []).append(i)
        tokens = [self.tokenizer(c, add_special_tokens=False)["input_ids"] for c in completions]
        out: list[list[float]] = [[] for _ in completions]
        for prompt, rows in rows_of.items():
            for start in range(0, len(rows), self.batch):
                part = [i for i in rows[start : start + self.batch] if tokens[i]]
                if part:
                    values = self._log_probs_of_one_prompt(prompt, [tokens[i] for i in part])
                    for i, row in zip(part, values, strict=True):
                        out[i] = row[: len(tokens[i])]
        return out

    def _log_probs_of_one_prompt(self, prompt: str, completions: list[list[int]]) -> list[list[float]]:
        """A row of log-probabilities a completion, padded at the end."""
        prefix = self.tokenizer(prompt, return_tensors="pt").to(self.device)
        length, count, longest = prefix["input_ids"].shape[1], len(completions), max(map(len, completions))
        cache = DynamicCache(config=self.model.config)
        first = self.model(**prefix, past_key_values=cache, logits_to_keep=1).logits[:, -1:]
        cache.batch_repeat_interleave(count)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([c + [pad] * (longest - len(c)) for c in completions], device=self.device)
        there = torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in completions], device=self.device)
        logits = self.model(
            ids,
            attention_mask=torch.cat([there.new_ones(count, length), there], 1),
            position_ids=torch.arange(length, length + longest, device=self.device).expand(count, -1),
            past_key_values=cache,
        ).logits
        logits = torch.cat([first.expand(count, -1, -1), logits[:, :-1]], 1).float()
        return (logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)).tolist()

    def _text_ends(self) -> set[int]:
        """Tokens that end a text, of which chat models have several."""
        of_model = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])} - {None}

    def _line_ends(self) -> Tensor:
        """Bool (vocabulary,): tokens that end a line or the text."""
        size = self.model.config.vocab_size
        texts = self.tokenizer.batch_decode([[i] for i in range(min(size, len(self.tokenizer)))])
        ends = torch.zeros(size, dtype=torch.bool)
        ends[: len(texts)] = torch.tensor(["\n" in text for text in texts])
        ends[list(self._eos)] = True
        return ends.to(self.device)


def _check_cache(config: PretrainedConfig, model: str) -> None:
    """Raises ConfigError if what a model keeps of a prompt cannot be shared by several lines, as a recurrent state."""
    layers = DynamicCache(config=config).layers
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in layers):
        raise ConfigError(
            f"describe.sampler: {model} has layers without a key-value cache ({config.model_type}), which is not "
            "sampled with transformers; set describe.sampler.kind=vllm, or name another model"
        )


def _nucleus(logits: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Tokens (N,) drawn from the smallest set of likeliest tokens whose probability reaches `top_p`."""
    # Sorting the whole vocabulary is slow; 256 candidates hold the nucleus unless the distribution is nearly flat,
    # and then they are the nucleus.
    top = min(256, logits.shape[-1])
    values, ids = logits.topk(top, -1)
    total = logits.logsumexp(-1, keepdim=True)
    if not total.isfinite().all():
        raise FloatingPointError("the model's logits are not finite; half precision may overflow: try dtype float32")
    probability = (values - total).exp()
    cumulative = probability.cumsum(-1)
    kept = probability * (cumulative - probability < top_p)
    edges = kept.cumsum(-1)
    choice = torch.searchsorted(edges, (uniform[:, None] * edges[:, -1:]).contiguous(), right=True)
    return ids.gather(-1, choice.clamp_max(top - 1))[:, 0]
