"""Numbers of things in words."""

from __future__ import annotations


def amount(number: int, thing: str, things: str | None = None) -> str:
    """A number of things: '1 image', '2 images'; of what has a plural of its own, `things`."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"
