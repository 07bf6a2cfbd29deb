"""Images as data URIs, small enough that hundreds fit one page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from kka_ray.data.decode import decode

_CRISP = 96
"""Images up to this side, in pixels, are enlarged without smoothing."""

_EXACT_BYTES = 12_000
"""PNGs up to this size are put into the page as they are."""


@dataclass(frozen=True)
class Picture:
    """An image that a page can show: its source, its size in pixels, and whether its pixels should be seen."""

    source: str
    width: int
    height: int
    crisp: bool


def exact(png: bytes, name: str, side: int = 192) -> Picture:
    """A small image as it was drawn, byte for byte; beyond 96 px or 12 kB a JPEG of at most `side` px.

    `name` names the image in errors. Raises DataError if it is damaged.
    """
    image = Image.fromarray(decode(png, name))
    if max(image.size) <= _CRISP and len(png) <= _EXACT_BYTES:
        return Picture(_uri("png", png), *image.size, True)
    return _jpeg(image, side)


def thumbnail(png: bytes, name: str, side: int = 64) -> Picture:
    """A lossy copy, at most `side` px. Raises DataError if the image is damaged."""
    return _jpeg(Image.fromarray(decode(png, name)), side)


def _jpeg(image: Image.Image, side: int) -> Picture:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, optimize=True)
    return Picture(_uri("jpeg", buffer.getvalue()), *image.size, max(image.size) <= _CRISP)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
