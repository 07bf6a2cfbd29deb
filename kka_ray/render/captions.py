"""Captions for images that have a class name only, or whose captions say little of how the image looks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kka_ray.data.captions import with_article
from kka_ray.render.attributes import Attributes

TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "a small photo of {}", "a close-up of {}", "an image of {}")


def vary(
    name: str, group: str | None, written: Sequence[str], style: str, seen: Attributes, rng: np.random.Generator
) -> str:
    """One caption, drawn anew from `rng` at each call.

    Args:
        name: the class in plain words; used where nothing is `written`.
        group: what the class belongs to, said now and then; None if unknown.
        written: captions by people.
        style: words that half of the captions end with, as in "seen from above"; may be empty.
        seen: what the image looks like; each attribute is said in some of the captions.
    """
    if written:
        text = written[int(rng.integers(len(written)))].strip().rstrip(".").strip()
    else:
        colour = seen.colour if seen.colour and rng.random() < 0.35 else None
        text = TEMPLATES[int(rng.integers(len(TEMPLATES)))].format(with_article(f"{colour} {name}" if colour else name))
        if group and rng.random() < 0.1:
            text += f", {group}"
    if style and rng.random() < 0.5:
        text += f", {style}"
    if seen.background and rng.random() < 0.35:
        on = "against" if rng.random() < 0.3 else "on"
        text += f" {on} {with_article(f'plain {seen.background}' if seen.plain else seen.background)} background"
    for word in (seen.light, seen.texture):
        if word and rng.random() < 0.25:
            text += f", {word}"
    return text
