"""A data set as its authors publish it, as the Parquet files that the data modules read."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from kka_ray.data.decode import content_of, decode, encode_png
from kka_ray.data.published import SETS, Entry
from kka_ray.data.target import new_folder
from kka_ray.errors import ConfigError, DataError

_COLUMNS = [
    ("image", pa.binary()),
    ("label", pa.int32()),
    ("class_name", pa.string()),
    ("superclass", pa.string()),
    ("split", pa.string()),
    ("captions", pa.list_(pa.string())),
    ("source", pa.string()),
]
_OWN_COLUMNS = {
    "oxford102": [("orig_split", pa.string())],
    "ucm_captions": [("caption_id", pa.int32())],
    "magnetic_tile": [("mask", pa.binary()), ("group", pa.string())],
}
_SPLITS = {"magnetic_tile": ("all",)}
"""Where they are not `train` and `test`."""

_ROWS_OF_FILE, _ROWS_AT_ONCE = 10_000, 500
_CONVERTED = (".tif", ".tiff")
"""Files that become PNG; others stay as they are."""


def import_set(
    name: str,
    source: Path,
    target: Path,
    *,
    size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Writes the set `name`, whose archives were unpacked in the folder `source`, as `target/SPLIT-*.parquet`.

    Pictures lose nothing: files keep their bytes, but for TIFF, which becomes PNG as raw pixels do. With `size`,
    pictures whose short side has more pixels are scaled down to it, and are PNG. Nothing is left behind if the import
    fails. `progress` is told the rows done, and all. Returns how many rows each split has.

    Raises ConfigError if there is no such set, DataError if `source` does not hold it, if a file is damaged, a mask has
    another size than its picture, or `target` is not empty; ResourceError if that cannot be written.
    """
    if name not in SETS:
        raise ConfigError(f"there is no set {name!r} to import; there are {', '.join(SETS)}")
    if not source.is_dir():
        what = "is a file; unpack it and name" if source.exists() else "does not exist; name"
        raise DataError(f"{source} {what} the folder with what the authors publish")
    schema = pa.schema(_COLUMNS + _OWN_COLUMNS.get(name, []))
    with new_folder(target) as work:
        entries = SETS[name](source)
        twice = [s for s, count in Counter(entry.source for entry in entries).items() if count > 1]
        if twice:
            raise DataError(f"{source} holds {twice[0]} more than once; name the folder of one copy of the set")
        counts: dict[str, int] = {}
        for split in _SPLITS.get(name, ("train", "test")):
            rows = [entry for entry in entries if entry.split == split]
            if not rows:
                part = "" if split == "all" else f" for {split}"
                raise DataError(f"{source} holds no picture of {name}{part}; name the folder in which it was unpacked")
            files = math.ceil(len(rows) / _ROWS_OF_FILE)
            for number in range(files):
                file = work / f"{split}-{number:05d}-of-{files:05d}.parquet"
                shown = rows[number * _ROWS_OF_FILE : (number + 1) * _ROWS_OF_FILE]
                with pq.ParquetWriter(file, schema) as writer:
                    for start in range(0, len(shown), _ROWS_AT_ONCE):
                        some = [_row(entry, size) for entry in shown[start : start + _ROWS_AT_ONCE]]
                        writer.write_table(pa.Table.from_pylist(some, schema=schema))
                        counts[split] = counts.get(split, 0) + len(some)
                        progress(sum(counts.values()), len(entries))
    return counts


def _row(entry: Entry, size: int | None) -> dict[str, Any]:
    """The columns of a picture."""
    content = content_of(entry.picture) if isinstance(entry.picture, Path) else entry.picture
    name = str(entry.picture) if isinstance(entry.picture, Path) else entry.source
    image = Image.fromarray(content if isinstance(content, np.ndarray) else decode(content, name))
    scaled = _scaled(image, size, Image.Resampling.LANCZOS)
    keeps = isinstance(content, bytes) and scaled is image and not name.endswith(_CONVERTED)
    row = {
        "image": content if keeps else encode_png(np.asarray(scaled)),
        "label": entry.label,
        "class_name": entry.class_name,
        "superclass": entry.superclass,
        "split": None if entry.split == "all" else entry.split,
        "captions": entry.captions,
        "source": entry.source,
        **entry.extra,
    }
    if entry.mask is not None and entry.mask.exists():
        row["mask"] = _mask(entry.mask, image.size, size)
    return row


def _mask(file: Path, shape: tuple[int, int], size: int | None) -> bytes | None:
    """A mask as a PNG of 1 bit, white at defects; none if it is black, or is so once scaled. `shape`: width and height
    of its picture."""
    mask = Image.fromarray(decode(content_of(file), str(file))[..., 0] > 127)
    if mask.size != shape:
        raise DataError(f"{file} has the size {mask.size}, its picture {shape}; fetch both again")
    scaled, buffer = _scaled(mask, size, Image.Resampling.NEAREST), io.BytesIO()
    scaled.save(buffer, "PNG")
    return buffer.getvalue() if scaled.getbbox() else None


def _scaled(image: Image.Image, size: int | None, how: Image.Resampling) -> Image.Image:
    """An image whose short side has `size` pixels at most."""
    short = min(image.size)
    if size is None or short <= size:
        return image
    width, height = (max(1, round(side * size / short)) for side in image.size)
    return image.resize((width, height), how)
