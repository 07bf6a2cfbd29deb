"""The base of all configuration models."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a run, a sweep or a training may be called: its folder is called so."""

TEXT = r"\S"
"""Of a text that must not be empty."""


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
