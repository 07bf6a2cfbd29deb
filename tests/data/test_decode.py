import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from kka_ray.data.decode import FORMATS, MAX_SCANS, TooLargeError, UnsupportedError, decode, encode_png, open_image
from kka_ray.errors import DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def black_png(width: int, height: int) -> bytes:
    """A black 1-bit PNG, made without an image in memory."""
    squeeze, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    data = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_back_as_they_were(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    out = decode(saved(Image.fromarray(PIXELS), kind, **options), "a")
    assert out.dtype == np.uint8
    assert np.array_equal(out, PIXELS)


def test_jpeg_is_close():
    smooth = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    assert np.abs(decode(saved(Image.fromarray(smooth), "JPEG"), "a").astype(int) - smooth).max() <= 3


def test_png_round_trip_repeats_byte_for_byte():
    content = encode_png(PIXELS)
    assert content == encode_png(np.asfortranarray(PIXELS))
    assert np.array_equal(decode(content, "a"), PIXELS)


@pytest.mark.parametrize("bad", [PIXELS.astype(np.float32), PIXELS[..., 0], np.zeros((4, 4, 4), np.uint8)])
def test_encode_refuses_other_arrays(bad):
    with pytest.raises(ValueError, match="expected uint8"):
        encode_png(bad)


def test_grey_gets_three_equal_channels():
    out = decode(saved(Image.fromarray(PIXELS[..., 0]), "PNG"), "a")
    assert np.array_equal(out, np.repeat(PIXELS[..., :1], 3, axis=2))


def test_one_bit_is_black_and_white():
    out = decode(saved(Image.fromarray(PIXELS[..., 0] > 127), "PNG"), "a")
    assert set(np.unique(out)) == {0, 255}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    values = np.array([[0, 257, 25700, 65535]], np.uint16)
    assert decode(saved(Image.fromarray(values), kind), "a")[0, :, 0].tolist() == [0, 1, 100, 255]


def test_big_endian_sixteen_bits_turned_by_exif():
    values = np.array([[0, 257, 25700, 65535]], np.uint16)
    image = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    out = decode(saved(image, "TIFF", exif=exif), "a")
    assert out.shape == (4, 1, 3)
    assert out[:, 0, 0].tolist() == [0, 1, 100, 255]


def test_float_pixels_are_refused():
    with pytest.raises(UnsupportedError, match=r"a\.tif.*32-bit.*convert"):
        decode(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "a.tif")


def test_transparency_is_laid_on_white():
    image = np.zeros((2, 3, 4), np.uint8)
    image[:, 0] = (255, 0, 0, 255)
    image[:, 2] = (0, 0, 0, 128)
    out = decode(saved(Image.fromarray(image), "PNG"), "a")
    assert out[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]


def test_transparent_palette_is_laid_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert decode(saved(image, "PNG"), "a")[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert decode(saved(image, "PNG", transparency=1), "a")[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decode(saved(image, "JPEG", quality=95), "a")[8, 8].astype(int) - (255, 0, 0)).max() < 12


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    out = decode(saved(Image.fromarray(PIXELS), "PNG", exif=exif), "a")
    assert np.array_equal(out, np.rot90(PIXELS, -1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_several(kind):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(content, "a") == (255, 0, 0)).all()


def noisy(kind: str) -> bytes:
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind, **options)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_cut_short(kind, share):
    content = noisy(kind)
    with pytest.raises(DataError, match=r"^shots/7\.x: .*(replace|convert)"):
        decode(content[: int(len(content) * share)], "shots/7.x")


def test_png_without_its_last_chunk():
    with pytest.raises(DataError, match=r"a\.png: .*cut short or damaged"):
        decode(noisy("PNG")[:-12], "a.png")


def test_png_with_one_flipped_bit():
    content = bytearray(noisy("PNG"))
    content[len(content) // 2] ^= 4
    with pytest.raises(DataError, match=r"a\.png: .*damaged"):
        decode(bytes(content), "a.png")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"<svg></svg>", b"%PDF-1.4", bytes(1000)]
)
def test_not_an_image(content):
    with pytest.raises(DataError, match=r"^notes: .*(replace|use one of)"):
        decode(content, "notes")


@pytest.mark.parametrize("kind", ["PPM", "ICO", "PCX", "TGA"])
def test_other_formats_are_refused(kind):
    with pytest.raises(DataError, match="PNG, JPEG, WEBP, BMP, TIFF, GIF"):
        decode(saved(Image.fromarray(PIXELS), kind), "a")


def test_bomb_is_refused_at_once():
    bomb = black_png(20_000, 20_000)
    assert len(bomb) < 1_000_000
    start = time.process_time()
    with pytest.raises(TooLargeError, match=r"^bomb\.png: .*20000 x 20000 pixels.*scale it down"):
        decode(bomb, "bomb.png")
    assert time.process_time() - start < 0.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [8_001, 10_000])
def test_limit_holds_below_the_library_s_own(side):
    # The data of this PNG are far too short: the error shows that they were not looked at.
    png = black_png(8, 8).replace(struct.pack(">II", 8, 8), struct.pack(">II", side, side))
    png = png[:29] + struct.pack(">I", zlib.crc32(png[12:29])) + png[33:]
    with pytest.raises(TooLargeError, match=f"{side} x {side}"):
        decode(png, "a")


def test_limit_is_inclusive():
    content = encode_png(PIXELS)
    assert decode(content, "a", max_pixels=240).shape == (12, 20, 3)
    with pytest.raises(TooLargeError, match="20 x 12 pixels, more than the limit of 239"):
        decode(content, "a", max_pixels=239)


def _tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """One row of grey pixels of 12 or 16 bits, uncompressed, little-endian."""
    if bits == 12:
        stream = "".join(f"{v:012b}" for v in values.tolist())
        data = bytes(int(stream[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(stream), 8))
    else:
        data = values.astype("<u2").tobytes()
    tags = [(256, len(values)), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    tags.append((279, len(data)))
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def _repeated(scans: int, head: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes again until there are so many; `head` follows its first marker."""
    content = saved(Image.fromarray(PIXELS), "JPEG", progressive=True)
    last, end = content.rindex(b"\xff\xda"), len(content) - 2
    more = scans - content.count(b"\xff\xda")
    return content[:2] + head + content[2:end] + content[last:end] * more + content[end:]


def test_a_jpeg_of_very_many_scans_is_refused():
    assert decode(_repeated(MAX_SCANS), "a.jpg").shape == PIXELS.shape
    with pytest.raises(UnsupportedError, match=r"^a\.jpg: is a JPEG of more than 100 scans; save it anew"):
        decode(_repeated(MAX_SCANS + 1), "a.jpg")


def test_scans_are_counted_in_the_image_alone():
    comment = b"\xff\xda" * 200
    head = b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment
    assert decode(_repeated(20, head) + _repeated(MAX_SCANS), "a.jpg").shape == PIXELS.shape


def test_scans_behind_restarts_and_bytes_between_markers_are_counted():
    content = _repeated(MAX_SCANS + 1)
    for between in (b"\xff\xd3", b"\xff\x00", b"junk", b"\xff\xff"):
        with pytest.raises(UnsupportedError, match="scans"):
            decode(content.replace(b"\xff\xda", between + b"\xff\xda"), "a.jpg")


def tiled_tiff(image: int, tile: int) -> bytes:
    """A black square, deflated, whose one tile is larger than itself."""
    content = zlib.compress(bytes(tile * tile))
    tags = [(256, image), (257, image), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, tile), (323, tile), (324, 8), (325, len(content))]
    content += b"\0" * (len(content) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 8 + len(content)) + content + directory


def test_the_limit_holds_for_tiles_that_are_larger_than_their_image():
    content = tiled_tiff(16, 64)
    assert decode(content, "a.tif", max_pixels=64 * 64).shape == (16, 16, 3)
    with pytest.raises(TooLargeError, match=r"a\.tif: has tiles of 64 x 64 pixels, more than the limit of 4095"):
        decode(content, "a.tif", max_pixels=64 * 64 - 1)


def test_strips_end_with_their_image():
    content = bytearray(_tiff(np.array([0, 255]), 16, 1))
    at = content.index(struct.pack("<HHI", 278, 4, 1)) + 8
    content[at : at + 4] = struct.pack("<I", 2**31)
    assert decode(bytes(content), "a.tif", max_pixels=2).shape == (1, 2, 3)


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_grey_of_any_depth_goes_from_black_to_white(bits, photometric):
    white = 2**bits - 1
    values = np.array([0, white // 3, white, white])
    found = decode(_tiff(values, bits, photometric), "scan.tif")[0, :, 0].tolist()
    assert found == ([0, 85, 255, 255] if photometric else [255, 170, 0, 0])


def test_our_own_limit_decides_however_high_it_is():
    content = black_png(14_000, 13_000)
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(TooLargeError, match="14000 x 13000 pixels, more than the limit of 181000000"):
        decode(content, "a.png", 181_000_000)
    assert before == Image.MAX_IMAGE_PIXELS
    assert open_image(content, "a.png", 182_000_000).size == (14_000, 13_000)
