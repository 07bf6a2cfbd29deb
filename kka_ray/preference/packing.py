"""Preference pairs packed for one pass through the model: each prompt is read once, each line once, nothing is padded.

The pairs of a batch share a few prompts that are several times longer than the lines, and a line is part of several
pairs. A packed batch is one row in which every prompt is followed by its distinct lines; a mask lets a line see its
prompt and itself alone, and its positions go on from the prompt's, so that its log-probabilities are those it has by
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from kka_ray.errors import ConfigError, StageError

_EXACT, _ROUNDED = 1e-3, 0.3
"""Nats a token by which a line may differ in a packed batch, in float32 and in half precision."""

Tokens = tuple[int, ...]
Line = tuple[Tokens, Tokens]
"""Tokens of a prompt and of a line after it."""


class Packer:
    """Makes a packed batch of tokenised pairs: dicts with `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    def __init__(self, max_length: int, additive: torch.dtype | None = None, end: int | None = None) -> None:
        """`max_length` cuts the end of prompt and line together, in tokens. `additive`: the dtype of a mask that is
        added to the weights of attention, as plain (eager) attention does, which takes a Boolean one for 0 and 1.
        `end`: the token that TRL puts behind each line and that is left out, as sampling ends with the line."""
        self.max_length, self.additive, self.end = max_length, additive, end

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch, with L tokens in all, T tokens of lines and B pairs.

        `input_ids` and `position_ids` are (1, L), `attention_mask` (1, 1, L, L) is True (additive: 0) where a token is
        seen. `logits_to_keep` (K,) are the places whose logits are wanted; token t of the lines is `targets[t]`,
        predicted at the kept place `predicted_at[t]`, and belongs to line `line_of[t]`; `chosen` and `rejected` (B,)
        are lines, `lines` their tokens.

        Raises StageError if the cut leaves no token by which a pair's lines differ: it would teach nothing.
        """
        lines: dict[Line, int] = {}
        sides: dict[str, list[int]] = {"chosen": [], "rejected": []}
        for pair in pairs:
            prompt = tuple(pair["prompt_ids"])
            room = max(self.max_length - len(prompt), 0)
            cut = {side: self._line(pair[f"{side}_ids"])[:room] for side in sides}
            if cut["chosen"] == cut["rejected"]:
                raise StageError(
                    f"a prompt has {len(prompt)} of the {self.max_length} tokens of preference.max_length, which cuts "
                    "off all that its lines differ by: raise preference.max_length, or lower describe.examples"
                )
            for side, members in sides.items():
                members.append(lines.setdefault((prompt, cut[side]), len(lines)))
        batch = {**_pack(list(lines)), **{side: torch.tensor(members) for side, members in sides.items()}}
        if self.additive is not None:
            seen, least = batch["attention_mask"], torch.finfo(self.additive).min
            batch["attention_mask"] = torch.zeros(seen.shape, dtype=self.additive).masked_fill(~seen, least)
        return batch

    def _line(self, ids: Sequence[int]) -> Tokens:
        return tuple(ids[:-1] if ids and ids[-1] == self.end else ids)


def mask_of(model: Any) -> torch.dtype | None:
    """What a `Packer` for a transformers model wants as `additive`."""
    eager = getattr(model.config, "_attn_implementation", None) == "eager"
    return model.dtype if eager else None


@torch.no_grad()
def check_packed(model: Any, packer: Packer, pairs: Sequence[dict[str, Any]], name: str, *, exact: bool) -> None:
    """Raises ConfigError if a model gives the lines of the longest pair other log-probabilities in a packed batch than
    each by itself: recurrent layers carry a state from line to line, and windows of attention are lost with the mask.

    `exact`: the model computes in float32 and its weights are not quantised.
    """
    longest = max(pairs, key=lambda p: len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])))
    device = next(model.parameters()).device

    def found(batch: dict[str, Any]) -> Tensor:
        return log_probs(model, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}).cpu()

    batch = packer([longest])
    training = model.training
    model.eval()
    try:
        packed = found(batch)
        # Alone a line needs no mask, and the model sees to its windows itself.
        alone = torch.cat([found({**_pack([line]), "attention_mask": None}) for line in batch["lines"]])
    finally:
        model.train(training)
    tokens = torch.tensor([max(len(line), 1) for _, line in batch["lines"]])
    worst = float(((packed - alone).abs() / tokens).max())
    if worst > (_EXACT if exact else _ROUNDED):
        raise ConfigError(
            f"describe.sampler.model: DPO cannot train {name} ({model.config.model_type}): in a batch of several lines "
            f"its log-probabilities differ from those of each line alone by {worst:.2g} a token, as with recurrent "
            "layers or windows of attention. Name a model with full attention, or set loop.rounds=0"
        )


def _pack(lines: list[Line]) -> dict[str, Any]:
    ids: list[int] = []
    positions: list[int] = []
    spans: list[tuple[range, range]] = []  # what each run of tokens sees besides itself, and the run
    targets: list[int] = []
    at: list[int] = []
    line_of: list[int] = []
    for prompt in dict.fromkeys(prompt for prompt, _ in lines):
        head = range(len(ids), len(ids) + len(prompt))
        spans.append((range(0), head))
        ids += prompt
        positions += range(len(prompt))
        for number, (own, line) in enumerate(lines):
            if own != prompt:
                continue
            run = range(len(ids), len(ids) + len(line))
            spans.append((head, run))
            ids += line
            positions += range(len(prompt), len(prompt) + len(line))
            targets += line
            at += [head[-1], *run[:-1]]
            line_of += [number] * len(line)
    mask = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for seen, run in spans:
        mask[run.start : run.stop, seen.start : seen.stop] = True
        mask[run.start : run.stop, run.start : run.stop] = torch.ones(len(run), len(run), dtype=torch.bool).tril()
    kept, predicted_at = np.unique(at, return_inverse=True)
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": mask[None, None],
        "logits_to_keep": torch.tensor(kept),
        "predicted_at": torch.tensor(predicted_at),
        "targets": torch.tensor(targets),
        "line_of": torch.tensor(line_of),
        "lines": lines,
    }


def log_probs(model: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
    """Log-probability of each line of a packed batch after its prompt, float32 (lines,), in nats."""
    inputs = {k: batch[k] for k in ("input_ids", "position_ids", "attention_mask", "logits_to_keep")}
    logits = model(**inputs, use_cache=False).logits[0].float()
    at, targets = batch["predicted_at"], batch["targets"]
    of_tokens = logits[at, targets] - logits.logsumexp(-1)[at]
    return of_tokens.new_zeros(len(batch["lines"])).index_add(0, batch["line_of"], of_tokens)


class SamePromptSampler(Sampler[int]):
    """All pairs, shuffled anew each epoch, so that `size` of them in a row have as few prompts as possible."""

    def __init__(self, prompts: Sequence[Tokens], size: int, seed: int) -> None:
        """`prompts` are those of the pairs, in order."""
        self.prompts, self.size, self.seed, self.epoch = prompts, size, seed, 0

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        rank = {prompt: rng.random() for prompt in dict.fromkeys(self.prompts)}
        order = sorted(rng.permutation(len(self.prompts)), key=lambda i: rank[self.prompts[i]])
        whole = len(order) // self.size * self.size
        for block in rng.permutation(whole // self.size):
            yield from map(int, order[block * self.size : (block + 1) * self.size])
        yield from map(int, order[whole:])
