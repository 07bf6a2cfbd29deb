"""The base of all configuration models."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a run, a sweep or a training may be called: its folder is called so."""

TEXT = r"\S"
"""Of a text that must not be empty."""

URL = r"^https?://[^\s@]+$"
"""Of an address without a user's name."""


def _whole_uri(value: str) -> str:
    half = re.match(r"([a-z][a-z0-9+.-]+):/(?!/)", value)
    if half:
        raise ValueError(f"looks like a URI with one slash; write two, as in {half[1]}://bucket/folder")
    return value


FolderOrUri = Annotated[str, AfterValidator(_whole_uri)]
"""A folder's path, or its fsspec URI."""


def or_of_kind(kind: str) -> BeforeValidator:
    """For a union that is told apart by `kind`: a mapping without one is of this, the default's."""

    def with_kind(value: Any) -> Any:
        return {"kind": kind, **value} if isinstance(value, dict) and "kind" not in value else value

    return BeforeValidator(with_kind)


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
