"""The anomaly set that is kept from round to round.

What is kept when there is more than enough: hard images before between ones before images never judged before easy
ones, and never a normal-like one. *Within* the hard band the order is random, by a hash of the seed and the id, not by
hardness: taking the nearest first would crowd the set at the lower edge, where true normals lie that were drawn and
labelled by mistake, and taking the furthest first would undo the point of the loop. New rounds get no precedence
either, as an image's rank then never changes and a set changes only as much as its verdicts do. Among the others the
nearer to the band come first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kka_ray.errors import StageError
from kka_ray.records import Verdict

_RANK = {"hard": 0, "between": 1, "unjudged": 2, "easy": 3}


@dataclass(frozen=True, slots=True)
class KeptImage:
    """A drawn image of the set, with its last verdict; `unjudged`, hardness 0, in the zero-th set."""

    id: str
    round: int
    label: Literal["unjudged", "hard", "between", "easy"] = "unjudged"
    hardness: float = 0.0


def zeroth(ids: Iterable[str], budget: int, seed: int) -> list[KeptImage]:
    """The zero-th set: `budget` images at random out of those drawn in round 0, all of them where there are fewer.

    No evaluator has a say in it. `ids` are the images that were drawn without error from descriptions that the text
    guard let pass. The draw depends on the seed and the ids, not on their order. In the order of ids. Raises
    StageError for a negative budget or ids given twice.
    """
    unique = _unique(ids)
    _check(budget)
    drawn = sorted(unique, key=lambda i: _lot(i, seed))[:budget]
    return [KeptImage(i, 0) for i in sorted(drawn)]


def target_size(mode: Literal["rep", "add"], budget: int, rounds: int, round: int) -> int:
    """Images in the set after `round` (0 is the zero-th): the whole `budget`, or with `add` an equal part each round.

    `rounds` counts the rounds after the zero-th. With `add` the set holds `budget` after the last round.
    """
    return budget if mode == "rep" else budget * (min(round, rounds) + 1) // (rounds + 1)


def update(
    kept: Sequence[KeptImage],
    new: Iterable[Verdict],
    mode: Literal["rep", "add"],
    budget: int,
    *,
    rounds: int,
    round: int,
    seed: int,
) -> list[KeptImage]:
    """The set after `round`, in the order of ids.

    `new` are the verdicts of this round: of its images, and of earlier ones where they were judged again, whose newer
    verdict then counts; a kept image that is now normal-like is dropped.

    `rep`: the best `budget` of kept and new images, so hard ones replace easy ones. `add`: every kept image stays, and
    the best new ones that are hard or between join, at most an equal part of the budget a round (`target_size`), so the
    set holds at most `budget` in the end. Easy images never join: they would only loosen the boundary.

    Raises StageError for a negative budget, ids given twice, or an `add` set that is larger than its target already.
    """
    _check(budget)
    verdicts = list(new)
    by_id = {v.id: v for v in verdicts}
    _unique(v.id for v in verdicts)
    _unique(k.id for k in kept)
    stays = [k for k in (_judged(k, by_id.get(k.id)) for k in kept) if k is not None]
    there = {k.id for k in kept}
    comes = [_kept(v) for v in verdicts if v.id not in there]
    candidates = [k for k in comes if k is not None]
    if mode == "rep":
        best = sorted([*stays, *candidates], key=lambda k: _order(k, seed))[:budget]
    else:
        target = target_size(mode, budget, rounds, round)
        if len(kept) > target:
            raise StageError(
                f"the kept set has {len(kept)} images, more than its {target} after round {round} of {rounds}: a set "
                "that grows must begin with a part of the budget (selection.target_size)"
            )
        room = target - target_size(mode, budget, rounds, round - 1) if round > 0 else target
        joining = sorted((k for k in candidates if k.label != "easy"), key=lambda k: _order(k, seed))
        best = [*stays, *joining[:room]]
    return sorted(best, key=lambda k: k.id)


def _kept(verdict: Verdict) -> KeptImage | None:
    if verdict.label == "normal_like":
        return None
    return KeptImage(verdict.id, verdict.round, verdict.label, verdict.hardness)


def _judged(image: KeptImage, verdict: Verdict | None) -> KeptImage | None:
    """A kept image under its newer verdict, if there is one; None if that makes it normal-like."""
    if verdict is None:
        return image
    if verdict.label == "normal_like":
        return None
    return replace(image, label=verdict.label, hardness=verdict.hardness)


def _order(image: KeptImage, seed: int) -> tuple[int, float, bytes]:
    within = image.hardness if image.label in ("between", "easy") else 0.0
    if image.label == "between" and within == 0:
        within = math.inf  # between it lies above the band: 0 is of an evaluator that collapsed and knows nothing
    return _RANK[image.label], within, _lot(image.id, seed)


def _lot(id_: str, seed: int) -> bytes:
    # Not the hash that gives the images their seeds: the set would be those of the least ones.
    return hashlib.sha256(f"kept|{seed}|{id_}".encode()).digest()


def _check(budget: int) -> None:
    if budget < 0:
        raise StageError(f"the budget of the anomaly set must be 0 or more images, got {budget}")


def _unique(ids: Iterable[str]) -> list[str]:
    """The ids as a list. Raises StageError if one is there twice."""
    out = list(ids)
    seen: set[str] = set()
    for id_ in out:
        if id_ in seen:
            raise StageError(f"image {id_} was given twice to the selection; give each drawn image once")
        seen.add(id_)
    return out
