"""Captions from templates, for data sets that have none of their own."""

from __future__ import annotations

from collections.abc import Sequence

from kka_ray.data.splits import stream


def with_article(name: str) -> str:
    """`name` after `a` or `an`; unchanged if it begins with an article already."""
    if name.split(" ")[0].lower() in ("a", "an", "the"):
        return name
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def without_article(name: str) -> str:
    """`name` without a leading `a`, `an` or `the`."""
    first, _, rest = name.partition(" ")
    return rest if first.lower() in ("a", "an", "the") and rest else name


def fill(templates: Sequence[str], names: Sequence[str], seed: int) -> tuple[str, ...]:
    """A caption for each name: a template drawn from the seed, its `{}` replaced by the name with an article."""
    picks = stream(seed, "captions").integers(len(templates), size=len(names))
    return tuple(templates[i].format(with_article(name)) for i, name in zip(picks, names, strict=True))
