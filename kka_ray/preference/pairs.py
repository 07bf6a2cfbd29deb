"""Preference pairs: of two lines that the model wrote for the same prompt, the hard one is chosen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np

from kka_ray.config.models import PreferenceConfig
from kka_ray.records import Description, PreferencePair, Prompt, Verdict

VERSION = 4


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
    that was judged hard once and easy another time counts as neither.

    Another image of the same text may well fall on the other side of an edge, so the surest lines come first: hard
    ones from the middle of the band, easy ones from far beyond it, normal-like ones from deep within the normals. Each
    chosen line meets two others before a less sure one is chosen: one too far from the normals (easy) and one too near,
    as far as there are both. With more of one kind the model would learn to go the other way, past the hard ones.
    """
    label = {v.id: v.label for v in verdicts}
    rng = np.random.default_rng([seed, 7])
    doubt = _doubt(descriptions, verdicts, rng)
    text_of = {p.id: p.text for p in prompts}
    chosen: dict[str, list[Description]] = defaultdict(list)
    rejected: dict[str, list[Description]] = defaultdict(list)
    for line in sorted(descriptions, key=lambda d: (doubt[d.id], d.id)):
        if label.get(line.id) == "hard":
            chosen[line.prompt_id].append(line)
        elif _rejected_as(line, label) in config.rejected:
            rejected[line.prompt_id].append(line)

    candidates = []
    for prompt in sorted(chosen):
        good, bad = _disjoint(chosen[prompt], rejected[prompt])
        for place, a in enumerate(good):
            for turn, b in enumerate(_in_turns(bad, label, place)):
                candidates.append((turn // 2, doubt[a.id], a.id, turn, a, b))
    candidates.sort(key=lambda c: c[:4])
    most = min(config.max_pairs, config.steps * config.batch)
    return [
        PreferencePair(a.prompt_id, a.id, b.id, text_of[a.prompt_id], completion(a), completion(b))
        for *_, a, b in candidates[:most]
    ]


def _doubt(
    descriptions: Sequence[Description], verdicts: Sequence[Verdict], rng: np.random.Generator
) -> dict[str, float]:
    """How unsure each line's label is, by its rank among those of that label: 0 the surest, below 1.

    Of lines that were never judged none is surer than another, and chance gives the rank.
    """
    hard = [v.hardness for v in verdicts if v.label == "hard"]
    middle = float(np.median(hard)) if hard else 0.0
    towards = {
        "hard": lambda h: abs(h - middle),
        "easy": lambda h: -h,
        "normal_like": lambda h: h,
    }
    doubt = {d.id: float(rng.random()) for d in descriptions}
    for name, key in towards.items():
        of_label = sorted((v for v in verdicts if v.label == name), key=lambda v: (key(v.hardness), v.id))
        doubt |= {v.id: rank / len(of_label) for rank, v in enumerate(of_label)}
    return doubt


def _in_turns(bad: Sequence[Description], label: Mapping[str, str], place: int) -> list[Description]:
    """The partners of the hard line with that place: easy ones and others in turns, until there are no more of a kind.

    Each kind begins with another line than for the places before, so that all of them are used.
    """
    kinds: list[list[Description]] = [[], []]
    for line in bad:
        kinds[label.get(line.id) == "easy"].append(line)
    turned = [kind[place % len(kind) :] + kind[: place % len(kind)] if kind else [] for kind in kinds]
    if place % 2:
        turned.reverse()
    return [line for pair in zip_longest(*turned) for line in pair if line is not None]


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
    """One line a text on each side, the first, and no text on both."""
    sides: list[dict[str, Description]] = [{}, {}]
    for lines, side in zip((good, bad), sides, strict=True):
        for line in lines:
            side.setdefault(line.text.lower(), line)
    both = sides[0].keys() & sides[1].keys()
    kept_good, kept_bad = ([line for text, line in side.items() if text not in both] for side in sides)
    return kept_good, kept_bad
