"""Rows of the Parquet data sets: chosen columns, filtered while they are read, decoded on demand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kka_ray.data.decode import decode
from kka_ray.errors import DataError


def shards(folder: str | Path, split: str) -> list[Path]:
    """The files `SPLIT-*.parquet` of a data set, sorted. Raises DataError if there is none."""
    files = sorted(Path(folder).glob(f"{split}-*.parquet"))
    if not files:
        what = "has no" if Path(folder).is_dir() else "is not a folder and so has no"
        remedy = "name a folder that `kka import` made, in a run as data.path"
        raise DataError(f"{folder} {what} {split}-*.parquet; {remedy}")
    return files


def read_rows(
    files: Sequence[Path], columns: Sequence[str], where: pc.Expression | None = None
) -> list[dict[str, Any]]:
    """The rows for which `where` holds, in the files' order, with these columns.

    Raises DataError if a file is not there, is not Parquet, is damaged or lacks a column.
    """
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            missing = [c for c in columns if c not in pq.read_schema(file).names]
            if missing:
                raise DataError(f"{file} lacks columns: {', '.join(missing)}; see the data set's column list")
            # Without partitioning=None a folder named `a=b` on the way would turn into a column.
            table = pq.read_table(file, columns=list(columns), filters=where, partitioning=None)
        except FileNotFoundError:
            raise DataError(f"there is no file {file}") from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as Parquet ({error}); fetch or convert it again") from error
        rows += table.to_pylist()
    return rows


def decode_rows(rows: Sequence[dict[str, Any]], origin: str) -> tuple[np.ndarray, ...]:
    """The rows' images, uint8 (H, W, 3). Raises DataError naming `origin` and the row's `source`."""
    return tuple(decode(row["image"] or b"", f"{origin}: {row['source']}") for row in rows)
