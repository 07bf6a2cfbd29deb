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

from kka_ray.errors import StageError

Tokens = tuple[int, ...]
Line = tuple[Tokens, Tokens]
"""Tokens of a prompt and of a line after it."""


class Packer:
    """Makes a packed batch of tokenised pairs: dicts with `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    def __init__(self, max_length: int) -> None:
        """`max_length` cuts the end of prompt and line together, in tokens."""
        self.max_length = max_length

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch, with L tokens in all, T tokens of lines and B pairs.

        `input_ids` and `position_ids` are (1, L), `attention_mask` (1, 1, L, L) is True where a token is seen.
        `logits_to_keep` (K,) are the places whose logits are wanted; token t of the lines is `targets[t]`, predicted
        at the kept place `predicted_at[t]`, and belongs to line `line_of[t]`; `chosen` and `rejected` (B,) are lines,
        `lines` their tokens.

        Raises StageError if the cut leaves no token by which a pair's lines differ: it would teach nothing.
        """
        lines: dict[Line, int] = {}
        sides: dict[str, list[int]] = {"chosen": [], "rejected": []}
        for pair in pairs:
            prompt = tuple(pair["prompt_ids"])
            room = max(self.max_length - len(prompt), 0)
            cut = {side: tuple(pair[f"{side}_ids"])[:room] for side in sides}
            if cut["chosen"] == cut["rejected"]:
                raise StageError(
                    f"a prompt has {len(prompt)} of the {self.max_length} tokens of preference.max_length, which cuts "
                    "off all that its lines differ by: raise preference.max_length, or lower describe.examples"
                )
            for side, members in sides.items():
                members.append(lines.setdefault((prompt, cut[side]), len(lines)))
        return {**_pack(list(lines)), **{side: torch.tensor(members) for side, members in sides.items()}}


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
