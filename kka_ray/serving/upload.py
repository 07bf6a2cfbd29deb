"""A request's images, read with every limit held while they come in, and checked before any is decoded."""

from __future__ import annotations

from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from kka_ray.config.serve import ServeConfig
from kka_ray.data.decode import TooLargeError, UnsupportedError, open_image
from kka_ray.errors import DataError
from kka_ray.serving.refusal import Refusal, too_large

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
)
_NAME_LENGTH = 200


async def read_images(
    content_type: str | None, content_length: str | None, body: AsyncIterator[bytes], config: ServeConfig
) -> list[tuple[str, bytes]]:
    """(file name, content) of each file in a multipart body, in order.

    Never holds more than `max_total_bytes`, whatever the client declares or sends. Raises Refusal: 415 for a body that
    is not multipart, 400 for one that is broken, 413 beyond a limit, 422 for a part that is no file or no file at all.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Refusal(415, "not_multipart", "send the images as files of a multipart/form-data body")
    if content_length is not None and content_length.isdecimal():
        _check_total(int(content_length), config)
    collector = _Collector(config)
    received = 0
    try:
        parser = MultipartParser(boundary, collector.callbacks())  # type: ignore[arg-type]
        async for chunk in body:
            received += len(chunk)
            _check_total(received, config)
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise Refusal(400, "broken_multipart", f"the multipart body is broken: {error}") from error
    if not collector.ended:
        raise Refusal(400, "broken_multipart", "the multipart body is cut short")
    if not collector.files:
        raise Refusal(422, "no_image", "the request holds no image")
    return [(name, bytes(content)) for name, content in collector.files]


def check_image(content: bytes, name: str, config: ServeConfig) -> None:
    """Reads an image's header.

    Raises Refusal: 415 for a format that is not allowed or a kind that is not read, 413 for more than `max_pixels`,
    400 if the header cannot be read.
    """
    if not content:
        raise Refusal(400, "corrupt_image", "the file is empty", name)
    kind = _format(content)
    if kind is None or kind not in config.formats:
        raise Refusal(415, "unknown_format", f"only {', '.join(config.formats)} images are scored", name)
    try:
        if kind == "WEBP":
            _check_webp(content, name, config.max_pixels)
        else:
            open_image(content, name, config.max_pixels, config.formats).close()
    except TooLargeError as error:
        raise Refusal(413, "too_many_pixels", str(error), name) from error
    except UnsupportedError as error:
        raise Refusal(415, "unsupported_image", str(error), name) from error
    except DataError as error:
        raise Refusal(400, "corrupt_image", str(error), name) from error


def _check_total(size: int, config: ServeConfig) -> None:
    if size > config.max_total_bytes:
        raise too_large(config.max_total_bytes)


def _format(content: bytes) -> str | None:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for magic, kind in _MAGIC if content.startswith(magic)), None)


def _check_webp(content: bytes, name: str, max_pixels: int) -> None:
    try:
        width, height = _webp_size(content)
    except ValueError as error:
        raise DataError(f"{name}: the WEBP header cannot be read ({error}); the file is damaged") from error
    if width * height > max_pixels:
        raise TooLargeError(f"{name}: has {width} x {height} pixels, more than the limit of {max_pixels}")


def _webp_size(content: bytes) -> tuple[int, int]:
    """Width and height of a WebP file: Pillow would allot memory for all of its pixels as it opens it."""
    chunk = content[12:16]
    if len(content) < 30:
        raise ValueError("cut short")
    if chunk == b"VP8X":
        return int.from_bytes(content[24:27], "little") + 1, int.from_bytes(content[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        sides = content[26:28], content[28:30]
        width, height = (int.from_bytes(side, "little") & 0x3FFF for side in sides)
        return width, height
    raise ValueError(f"unknown chunk {chunk!r}")


class _Collector:
    """Hears what the multipart parser finds, and stops it beyond a limit."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.files: list[tuple[str, bytearray]] = []
        self.ended = False
        self._field, self._value = b"", b""
        self._disposition = b""

    def callbacks(self) -> dict[str, object]:
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "end")
        return {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def _part_begin(self) -> None:
        self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"filename")
        if name is None:
            raise Refusal(422, "not_a_file", "each part of the body must be an image file, with a file name")
        if len(self.files) == self.config.max_images:
            raise Refusal(413, "too_many_images", f"a request may hold {self.config.max_images} images")
        self.files.append((name.decode("utf-8", "replace")[:_NAME_LENGTH], bytearray()))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        name, content = self.files[-1]
        if len(content) + end - start > self.config.max_bytes:
            raise Refusal(413, "image_too_large", f"larger than {self.config.max_bytes} bytes", name)
        content += data[start:end]

    def _end(self) -> None:
        self.ended = True
