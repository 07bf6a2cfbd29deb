"""Small data sets for the tests: noise images, folders and Parquet files in the layouts of the real ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kka_ray.data.decode import encode_png


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """`picture(n)` is a PNG of noise, another for each n."""

    def make(number: int, size: int = 8) -> bytes:
        return encode_png(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))

    return make


@pytest.fixture
def write_rows() -> Callable[[Path, Sequence[dict[str, Any]]], Path]:
    """Writes rows as a Parquet file, the columns that are left out filled as in the real sets."""

    def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        full = [{"superclass": None, "split": None, "captions": [], **row} for row in rows]
        table = pa.Table.from_pylist(full)
        captions = table.column_names.index("captions")
        table = table.set_column(captions, "captions", table["captions"].cast(pa.list_(pa.string())))
        pq.write_table(table, path)
        return path

    return write


@pytest.fixture
def write_images(picture: Callable[..., bytes]) -> Callable[..., Path]:
    """`write_images(folder, count, first)` writes `count` distinct PNG files."""

    def write(folder: Path, count: int, first: int = 0) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for n in range(first, first + count):
            (folder / f"{n:03d}.png").write_bytes(picture(n))
        return folder

    return write


@pytest.fixture
def real_data() -> Path:
    """The folder with the real data sets; skips without it."""
    folder = os.environ.get("KKA_DATA")
    if not folder:
        pytest.skip("KKA_DATA does not name the folder with the real data sets")
    return Path(folder)
