"""What `kka_ray.experiment` leaves in a run's folder, read back."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from kka_ray.errors import StoreError

LABELS = ("normal_like", "hard", "between", "easy")
"""Labels of drawn images, from the normals outwards."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class RunFolder:
    """The summary, the configuration and the tables of a finished run, as rows; a table without rows is an empty list.

    Pictures are not held: `images` reads those that are asked for.
    """

    folder: Path
    summary: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    descriptions: Rows
    renderings: Rows
    """Without the images."""
    verdicts: Rows
    """The auditor's."""
    kept: Rows
    """Of every round; `set` is `round-N`."""
    normal_hardness: list[float]
    latent: Rows
    dpo: Rows
    evaluation: Rows
    review: Rows
    calibration: dict[str, Any]
    """Of the headline detector: `threshold`, `false_positive_rate`, ..."""

    @classmethod
    def read(cls, folder: Path) -> RunFolder:
        """Reads a run's folder. Raises StoreError if something is missing or damaged."""
        config_text = _text(folder / "config.yaml")
        return cls(
            folder,
            _json(folder / "summary.json"),
            config_text,
            yaml.safe_load(config_text),
            _rows(folder, "descriptions", "id", "round", "text", "status", "reason"),
            _rows(folder, "renderings", "id", "round", "status", "error"),
            _rows(folder, "verdicts"),
            _rows(folder, "kept"),
            [row["hardness"] for row in _rows(folder, "normal_hardness")],
            _rows(folder, "latent"),
            _rows(folder, "dpo"),
            _rows(folder, "evaluation"),
            _rows(folder, "review"),
            _json(folder / "detector" / "detector.json")["calibration"],
        )

    def images(self, ids: Collection[str]) -> dict[str, bytes]:
        """The drawn images with these ids, as PNG."""
        if not ids:
            return {}
        path = _table_path(self.folder, "renderings")
        table = _table(path, columns=["id", "image"], filters=[("id", "in", sorted(set(ids)))])
        return dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))


def _table_path(folder: Path, name: str) -> Path:
    return folder / "records" / f"{name}.parquet"


def _rows(folder: Path, name: str, *columns: str) -> Rows:
    rows: Rows = _table(_table_path(folder, name), columns=list(columns) or None).to_pylist()
    return rows


def _table(path: Path, **options: Any) -> pa.Table:
    try:
        return pq.read_table(path, **options)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable(path, error) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"the report needs {path}, which cannot be read: {error}. If the run was interrupted or the file is damaged, "
        "finish it with `kka resume` and its folder: what is in the store is not made again"
    )
