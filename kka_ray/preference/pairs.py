"""Preference pairs: of two lines that the model wrote for the same prompt, the hard one is chosen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np

from kka_ray.config.models import PreferenceConfig
from kka_ray.records import Description, PreferencePair, Prompt, Verdict

VERSION = 3


def build_pairs(
    prompts: Sequence[Prompt],
    descriptions: Sequence[Description],
    verdicts: Sequence[Verdict],
    config: PreferenceConfig,
    seed: int,
) -> list[PreferencePair]:
    """Pairs from the same prompt, each text on one side only, no pair twice.

    There are at most `config.max_pairs`, and no more than the training sees in its `steps` of `batch`.

    Chosen are the hard lines; rejected those that `config.rejected` names: `easy`, `normal_like` (drawn, but within
    the normals) and `guarded` (refused by the guard for describing the normal class, or for their form). A text
    that was judged hard once and easy another time counts as neither. Every chosen line is used about equally often,
    with different partners: in turns too far from the normals (easy) and too near, as far as there are both. With more
    of one kind the model would learn to go the other way, past the hard ones.
    """
    label = {v.id: v.label for v in verdicts}
    text_of = {p.id: p.text for p in prompts}
    chosen: dict[str, list[Description]] = defaultdict(list)
    rejected: dict[str, list[Description]] = defaultdict(list)
    for line in descriptions:
        if label.get(line.id) == "hard":
            chosen[line.prompt_id].append(line)
        elif _rejected_as(line, label) in config.rejected:
            rejected[line.prompt_id].append(line)

    rng = np.random.default_rng([seed, 7])
    candidates = []
    for prompt in sorted(chosen):
        good, bad = _disjoint(chosen[prompt], rejected[prompt])
        for a in good:
            # The turn puts each line's first partner before any line's second one.
            for turn, b in enumerate(_in_turns(bad, label, rng)):
                candidates.append((turn, float(rng.random()), a, b))
    candidates.sort(key=lambda c: (c[0], c[1]))
    return [
        PreferencePair(a.prompt_id, a.id, b.id, text_of[a.prompt_id], completion(a), completion(b))
        for _, _, a, b in candidates[: min(config.max_pairs, config.steps * config.batch)]
    ]


def _in_turns(bad: list[Description], label: Mapping[str, str], rng: np.random.Generator) -> list[Description]:
    """The lines at random, easy ones and others in turns until there are no more of one kind."""
    kinds: list[list[Description]] = [[], []]
    for j in rng.permutation(len(bad)):
        kinds[label.get(bad[j].id) == "easy"].append(bad[j])
    if rng.random() < 0.5:
        kinds.reverse()
    return [line for pair in zip_longest(*kinds) for line in pair if line is not None]


def completion(line: Description) -> str:
    """What the model is to write after the prompt: the cleaned text as one line."""
    return f" {line.text}\n"


def _rejected_as(line: Description, label: Mapping[str, str]) -> str:
    if line.id in label:
        return label[line.id]
    if line.reason in {"normal_class", "malformed", "too_long"}:
        return "guarded" if line.text else ""
    return ""


def _disjoint(good: list[Description], bad: list[Description]) -> tuple[list[Description], list[Description]]:
    """One line a text on each side, and no text on both."""
    first_good = {line.text.lower(): line for line in reversed(good)}
    first_bad = {line.text.lower(): line for line in reversed(bad)}
    both = first_good.keys() & first_bad.keys()
    keep = lambda lines: sorted((v for k, v in lines.items() if k not in both), key=lambda d: d.id)  # noqa: E731
    return keep(first_good), keep(first_bad)
