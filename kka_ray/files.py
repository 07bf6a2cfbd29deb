"""Files that are written whole or not at all: a reader sees the old content or the new one."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any


def absolute_path(path: str) -> str:
    """A path that means the same in every current folder, `~` being the user's own. An absolute one stays as it is: its
    links may lead elsewhere on another machine."""
    full = Path(path).expanduser()
    return str(full if full.is_absolute() else full.resolve())


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises OSError as the file system does."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def written(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A file to write within the block, which takes its place as `path` at the end, or goes if that is not reached.

    `shared`: another may be writing `path` at the same time. The file then has a name of its own, and what a killed
    process leaves of it is not written over by the next: for what is small.
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    temporary = path.with_name(f".{path.name}{own}.partial")
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes `text`; of several writers at once the last one's stays. Raises OSError as the file system does."""
    with written(path, shared=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value. Raises ValueError for NaN and infinities, which JSON has not."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def stays_inside(name: str) -> bool:
    """Whether a file's name, relative to a folder, leads to a place in that folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
