"""Image bytes from outside into pixels, defensively: the header first, the size limit next, the pixels last."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kka_ray.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""The only formats that are read: Pillow's less used readers are not shown bytes from outside."""

MAX_PIXELS = 64_000_000

MAX_SCANS = 100
"""Of a JPEG. Progressive ones have about ten; libtiff's limit of those within TIFFs is the same."""

_LIMIT = threading.Lock()
_BITS_PER_SAMPLE, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 258, 262, 322, 323
_WHITE_IS_ZERO = 0

_JPEG = b"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""A JPEG's marker that a length follows, or the last."""
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


class TooLargeError(DataError):
    """An image, or a tile of one, with more pixels than allowed. It was not decoded."""


class UnsupportedError(DataError):
    """An image of an allowed format, but of a kind that is not read. It was not decoded."""


def content_of(file: Path) -> bytes:
    """A file's bytes. Raises DataError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); give access to it or fetch it again") from error


def open_image(
    content: bytes, source: str, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """An image of which the header alone was read. `source` names it in errors.

    Raises TooLargeError if it has more than `max_pixels` pixels, or tiles that have, UnsupportedError if it is a JPEG
    of more than `MAX_SCANS` scans, or has 32-bit pixels, whose range is not known, and DataError if the header cannot
    be read.
    """
    if content.startswith(_JPEG) and _scans(content) > MAX_SCANS:
        # Each takes the time of a decoding, and a few bytes.
        raise UnsupportedError(f"{source}: is a JPEG of more than {MAX_SCANS} scans; save it anew or leave it out")
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on and refuses from 179 million on; our own limit decides, below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _without_limit():
                image = Image.open(io.BytesIO(content), formats=formats)
        tile = _tile_size(image)
    except Exception as error:
        # Pillow's own words name an object in memory here, which would differ from run to run.
        why = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{source}: is not an image that can be read ({why}); "
            f"use one of {', '.join(formats)}, or replace the file if it is damaged"
        ) from error
    for what, (width, height) in (("", image.size), ("tiles of ", tile)):
        if width * height > max_pixels:
            image.close()
            raise TooLargeError(
                f"{source}: has {what}{width} x {height} pixels, more than the limit of {max_pixels}; "
                "scale it down, leave it out or raise max_pixels"
            )
    if image.mode in ("I", "F"):
        image.close()
        raise UnsupportedError(
            f"{source}: has 32-bit pixels (mode {image.mode}), whose range is not known; "
            "convert it to 8 or 16 bits a channel"
        )
    return image


def decode(content: bytes, source: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes one image to uint8 (H, W, 3), RGB.

    Of an animation or a stack the first frame is taken; EXIF rotation is applied; transparent images are laid on
    white; images of 9 to 16 bits are brought to 0..255, black to white. `source` names the image in errors.

    Raises, before any pixel is decoded, what `open_image` raises, and DataError if the bytes are cut short or damaged.
    """
    if not content:
        raise DataError(f"{source}: the file is empty; replace it or leave it out")
    with open_image(content, source, max_pixels) as image:
        try:
            # Checks the checksums of a PNG, which decoding alone does not. The image cannot be used afterwards.
            image.verify()
        except Exception as error:  # Pillow's readers raise many types on damaged files
            raise _damaged(source, error) from error
    with open_image(content, source, max_pixels) as image:
        try:
            image.load()
            scale = _grey_scale(image)
            return _to_rgb(ImageOps.exif_transpose(image), scale)
        except Exception as error:
            raise _damaged(source, error) from error


def encode_png(image: np.ndarray) -> bytes:
    """An image, uint8 (H, W, 3), as PNG without metadata: equal pixels give equal bytes.

    Raises ValueError for any other shape or type.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _scans(content: bytes) -> int:
    """The scans of a JPEG, at most one more than allowed. Markers are found as libjpeg finds them: whatever is between
    two is passed over, compressed pixels among it, in which 0 follows each 255."""
    scans, at = 0, 2
    while scans <= MAX_SCANS and (found := _MARKER.search(content, at)):
        marker, at = content[found.end() - 1], found.end()
        if marker == _END_OF_IMAGE:
            break
        scans += marker == _START_OF_SCAN
        at += int.from_bytes(content[at : at + 2], "big")
    return scans


def _tile_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the tiles of a TIFF, which are decoded whole, also where the image is far smaller; else 0.
    Strips are as wide as the image, and end with it."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    width, height = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
    if not (isinstance(width, int) and isinstance(height, int)):
        raise ValueError(f"its tiles have the size {width} x {height}")
    return width, height


@contextmanager
def _without_limit() -> Iterator[None]:
    """Within the block Pillow reads headers of any size; one thread at a time, as its limit is global."""
    with _LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _damaged(source: str, error: Exception) -> DataError:
    return DataError(f"{source}: the image is cut short or damaged ({error}); replace the file or leave it out")


def _grey_scale(image: Image.Image) -> tuple[int, bool]:
    """The value of white of grey pixels with more than 8 bits, and whether black and white are exchanged: a TIFF may
    have 12 bits, or white at zero, which Pillow leaves as they are."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    return 2 ** (bits if isinstance(bits, int) else bits[0]) - 1, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _to_rgb(image: Image.Image, scale: tuple[int, bool]) -> np.ndarray:
    if image.mode.startswith("I;16"):
        white, inverted = scale
        grey = np.rint(np.asarray(image).astype(np.float32) / (white / 255)).clip(0, 255).astype(np.uint8)
        grey = 255 - grey if inverted else grey
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))
