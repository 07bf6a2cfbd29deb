"""Image bytes from outside into pixels, defensively: the header first, the size limit next, the pixels last."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kka_ray.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""The only formats that are read: Pillow's less used readers are not shown bytes from outside."""

MAX_PIXELS = 64_000_000


class TooLargeError(DataError):
    """An image with more pixels than allowed. It was not decoded."""


def decode(content: bytes, source: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes one image to uint8 (H, W, 3), RGB.

    Of an animation or a stack the first frame is taken; EXIF rotation is applied; transparent images are laid on
    white; 16-bit images are brought from 0..65535 to 0..255. `source` names the image in errors.

    Raises TooLargeError if the header promises more than `max_pixels` pixels, before any is decoded, and DataError
    if the bytes are not an image of the allowed formats, are cut short or damaged, or hold 32-bit pixels, whose range
    is not known.
    """
    if not content:
        raise DataError(f"{source}: the file is empty; replace it or leave it out")
    with _open(content, source, max_pixels) as image:
        try:
            # Checks the checksums of a PNG, which decoding alone does not. The image cannot be used afterwards.
            image.verify()
        except Exception as error:  # Pillow's readers raise many types on damaged files
            raise _damaged(source, error) from error
    with _open(content, source, max_pixels) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("I", "F"):
                raise DataError(
                    f"{source}: has 32-bit pixels (mode {upright.mode}), whose range is not known; "
                    "convert it to 8 or 16 bits a channel"
                )
            return _to_rgb(upright)
        except DataError:
            raise
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


def _open(content: bytes, source: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on; our own limit decides, and an error is not also a warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{source}: {error}; scale it down or leave it out") from error
    except Exception as error:
        # Pillow's own words name an object in memory here, which would differ from run to run.
        why = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{source}: is not an image that can be read ({why}); "
            f"use one of {', '.join(FORMATS)}, or replace the file if it is damaged"
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise TooLargeError(
            f"{source}: has {width} x {height} pixels, more than the limit of {max_pixels}; "
            "scale it down, leave it out or raise max_pixels"
        )
    return image


def _damaged(source: str, error: Exception) -> DataError:
    return DataError(f"{source}: the image is cut short or damaged ({error}); replace the file or leave it out")


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        grey = np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))
