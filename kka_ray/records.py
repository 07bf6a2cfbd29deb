"""The frozen records that travel between stages, and their Parquet form.

Each record carries the ids it came from. An id is given once and never changes: `r1-p003-s007` is the eighth line that
the language model wrote in round 1 for prompt 3, and its picture bears the same id. What fails or is rejected is a
record as well, with its reason.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Prompt:
    """A few-shot prompt made of the captions of representative normal samples."""

    id: str
    text: str
    normal_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Description:
    """A line that the language model wrote. `raw` is what it wrote, `text` what was read from it."""

    id: str
    prompt_id: str
    round: int
    raw: str
    text: str
    status: Literal["ok", "rejected"]
    reason: str = ""
    """Why it was rejected: `empty`, `too_short`, `too_long`, `malformed`, `duplicate`, `near_duplicate`,
    `normal_class`, or `error: ...` where sampling itself failed."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """An image drawn for a description, as PNG. `image` is empty where drawing failed, and `error` says why."""

    id: str
    round: int
    seed: int
    status: Literal["ok", "failed"]
    image: bytes
    image_sha256: str
    error: str = ""
    match: float | None = None
    """How well the image matches its text, in [0, 1]; None where that was not asked for (`render.match`)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the evaluator says of a drawn image.

    `hardness` is (log score - median) / MAD, both over the log scores of the fold's validation normals: about 0 for a
    typical normal image, large far from the normals. `fold` is the fold that did not train on the image.
    """

    id: str
    round: int
    fold: int
    score: float
    hardness: float
    label: Literal["normal_like", "hard", "between", "easy"]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One DPO example: two completions of the same prompt, the chosen one hard to tell from normal."""

    prompt_id: str
    chosen_id: str
    rejected_id: str
    prompt: str
    chosen: str
    rejected: str


Record = TypeVar("Record", Prompt, Description, Rendering, Verdict, PreferencePair)

_ARROW: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    float | None: pa.float64(),
    bytes: pa.binary(),
    tuple[str, ...]: pa.list_(pa.string()),
}


def schema(cls: type[Record]) -> pa.Schema:
    """The Arrow schema of a record type."""
    hints = typing.get_type_hints(cls)
    types = {f.name: hints[f.name] for f in fields(cls)}
    return pa.schema([(n, pa.string() if typing.get_origin(t) is Literal else _ARROW[t]) for n, t in types.items()])


def to_table(cls: type[Record], records: Iterable[Record]) -> pa.Table:
    """Records as an Arrow table; no records make an empty table with the right columns."""
    rows = [{f.name: getattr(r, f.name) for f in fields(cls)} for r in records]
    return pa.Table.from_pylist(rows, schema=schema(cls))


def from_table(cls: type[Record], table: pa.Table) -> list[Record]:
    """The inverse of `to_table`."""
    as_tuple = {f.name for f in fields(cls) if pa.types.is_list(schema(cls).field(f.name).type)}
    return [
        cls(**{k: tuple(v) if k in as_tuple else v for k, v in row.items()})  # type: ignore[arg-type]
        for row in table.to_pylist()
    ]
