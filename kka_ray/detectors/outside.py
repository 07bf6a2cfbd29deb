"""Anomalies from outside: random images of a folder or a Parquet data set that has nothing to do with the normals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from kka_ray.data.decode import content_of, decode
from kka_ray.data.folder import image_files
from kka_ray.data.parquet import decode_rows, read_rows, shards
from kka_ray.errors import DataError


def draw(path: str | Path, count: int, seed: int) -> list[np.ndarray]:
    """`count` different images, uint8 (H, W, 3) of any sizes, of the files `train-*.parquet` in a folder (columns
    `image` and `source`), or else of the image files in it and below.

    Raises DataError if there are fewer images, if two rows have one `source`, or if one that was drawn cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: outside images are drawn from one")
    parquet = any(folder.glob("train-*.parquet"))
    if parquet:
        files = shards(folder, "train")
        names = [row["source"] for row in read_rows(files, ["source"])]
    else:
        names = [file.relative_to(folder).as_posix() for file in image_files(folder, recursive=True)]
    if len(names) < count:
        raise DataError(f"{folder} holds {len(names)} images, but {count} outside images are wanted: add some")
    if len(set(names)) < len(names):
        raise DataError(f"{folder}: {len(names) - len(set(names))} rows have a source that another has; make it anew")
    drawn = [names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]]
    if parquet:
        rows = read_rows(files, ["image", "source"], pc.field("source").isin(drawn))
        return list(decode_rows(rows, str(folder)))
    return [decode(content_of(folder / name), str(folder / name)) for name in drawn]
