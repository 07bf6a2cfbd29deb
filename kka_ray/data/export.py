"""A Parquet set with defects as a folder in the layout of MVTec AD, split by group."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from kka_ray.amounts import amount
from kka_ray.data.base import content_hash
from kka_ray.data.decode import FORMATS, decode
from kka_ray.data.parquet import read_rows
from kka_ray.data.splits import draw_groups
from kka_ray.data.target import new_folder
from kka_ray.errors import DataError

_COLUMNS = ["image", "class_name", "superclass", "source", "mask", "group"]
_SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "GIF": ".gif",
}


_NORMAL = "normal"
_TEST_SHARE = 0.25


@dataclass
class Exported:
    """How many files were written."""

    train_good: int = 0
    test_good: int = 0
    defects: dict[str, int] = field(default_factory=dict)
    """Test images by defect."""
    masks: int = 0
    duplicates: int = 0
    """Test images left out because the same picture is among the training images, or the test images before it, and
    training images that occur twice."""


def export_folder(parquet: Path, target: Path, *, seed: int = 0) -> Exported:
    """Writes the rows of a Parquet file, or of every Parquet file in a folder, as `target/train/good`,
    `target/test/good`, `target/test/DEFECT` and `target/ground_truth/DEFECT`.

    Rows of the superclass "normal" are; the class names of the others name the defects. Columns: image,
    class_name, superclass, source, mask (PNG or null) and group. Groups stay together: of the groups with normal rows
    only, a quarter (at least one group) drawn from `seed` goes to `test/good` and the others to
    `train/good`; a group with any defect goes to the test as a whole. Image files keep their bytes; a mask takes the
    name of its image and `_mask.png`. Nothing is left behind if the export fails.

    Raises DataError if the rows cannot be read, an image or mask is damaged, a mask has another size than its image,
    there are fewer than two normal-only groups, a class name is no folder name, or `target` is not empty; ResourceError
    if it cannot be written.
    """
    with new_folder(target) as work:
        files = sorted(parquet.glob("*.parquet")) if parquet.is_dir() else [parquet]
        if not files:
            raise DataError(f"{parquet} holds no *.parquet file; name the file or the folder of the data set")
        rows = read_rows(files, _COLUMNS)
        _check_names(rows, parquet)
        train_groups = _train_groups(rows, seed, parquet)
        # Training rows first, so that of a picture in both parts the training copy stays.
        order = sorted(range(len(rows)), key=lambda i: _group(rows[i], i) not in train_groups)
        done, seen = Exported(), set[str]()
        for i in order:
            image = decode(rows[i]["image"] or b"", f"{parquet}: {rows[i]['source']}")
            digest = content_hash(image)
            if digest in seen:
                done.duplicates += 1
                continue
            seen.add(digest)
            part = "train" if _group(rows[i], i) in train_groups else "test"
            _write(rows[i], i, part, rows[i]["superclass"] == _NORMAL, image.shape[:2], work, done)
    return done


def _group(row: dict[str, Any], index: int) -> str:
    """The row's group; a row without one is a group of its own."""
    return f"row {index}" if row["group"] is None else f"group {row['group']}"


def _train_groups(rows: Sequence[dict[str, Any]], seed: int, parquet: Path) -> set[str]:
    mixed = {_group(row, i) for i, row in enumerate(rows) if row["superclass"] != _NORMAL}
    pure = {_group(row, i) for i, row in enumerate(rows)} - mixed
    if len(pure) < 2:
        raise DataError(
            f"{parquet} has {amount(len(pure), 'group')} with rows of the superclass {_NORMAL!r} only; at least 2 are "
            "needed, one to train on and one to test on"
        )
    tested = min(max(1, round(_TEST_SHARE * len(pure))), len(pure) - 1)
    return pure - draw_groups(pure, tested, seed, "export test")


def _check_names(rows: Iterable[dict[str, Any]], parquet: Path) -> None:
    for name in sorted({str(row["class_name"]) for row in rows if row["superclass"] != _NORMAL}):
        if name in ("", ".", "..", "good") or any(c in name for c in "/\\\0"):
            raise DataError(f"{parquet}: the class name {name!r} cannot name a folder of defects; rename the class")


def _write(
    row: dict[str, Any],
    index: int,
    part: str,
    is_normal: bool,
    shape: tuple[int, ...],
    work: Path,
    done: Exported,
) -> None:
    with Image.open(io.BytesIO(row["image"]), formats=FORMATS) as image:
        suffix = _SUFFIXES[str(image.format)]
    kind = "good" if is_normal else str(row["class_name"])
    # Only the last part of the source's path is used, and the row number keeps names apart. The group is in the name
    # so that who splits the training images further can keep groups together (`data.group`).
    group = "" if row["group"] is None else re.sub(r"[^A-Za-z0-9]+", "-", str(row["group"])) + "_"
    stem = f"{index:05d}_{group}{Path(str(row['source'])).stem}"
    _put(work / part / kind / f"{stem}{suffix}", row["image"])
    if part == "train":
        done.train_good += 1
    elif is_normal:
        done.test_good += 1
    else:
        done.defects[kind] = done.defects.get(kind, 0) + 1
        if row["mask"] is not None:
            mask = decode(row["mask"], f"the mask of {row['source']}")
            if mask.shape[:2] != shape:
                raise DataError(f"the mask of {row['source']} has the size {mask.shape[:2]}, its image {shape}")
            _put(work / "ground_truth" / kind / f"{stem}_mask.png", row["mask"])
            done.masks += 1


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
