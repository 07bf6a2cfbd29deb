"""Folders of runs: on this machine, or at any fsspec URI with a copy here while they are worked with.

What takes room and must survive a crash lies in the store. A run's folder is written at the run's end, so at a URI it
is written from a copy, the summary last.
"""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from kka_ray.errors import ConfigError, ResourceError, StoreError
from kka_ray.files import stays_inside

DETECTOR_FILES = ("config.yaml", "detector.json", "detector.safetensors")
"""What a detector needs of a run's folder."""


@dataclass(frozen=True)
class Place:
    """A folder: its name, a path or a URI, and where it is on this machine."""

    name: str
    here: Path

    def keep(self, *last: str) -> None:
        """Writes every file that is here to where the folder is kept, those named `last` after all others.

        Raises ResourceError if the storage is full or refuses.
        """
        if not is_uri(self.name):
            return
        files = [p.relative_to(self.here).as_posix() for p in sorted(self.here.rglob("*")) if p.is_file()]
        filesystem, root = _storage(self.name)
        for file in sorted(files, key=lambda f: last.index(f) + 1 if f in last else 0):
            path = posixpath.join(root, file)
            try:
                filesystem.makedirs(posixpath.dirname(path), exist_ok=True)
                filesystem.pipe_file(path, (self.here / file).read_bytes())
            except OSError as error:
                raise ResourceError(
                    f"cannot write {file} to {self.name}: {error}. Mend that, then run the same command again: "
                    "finished stages are not repeated"
                ) from error

    def remove(self, file: str) -> None:
        """Deletes a file, if it is there."""
        (self.here / file).unlink(missing_ok=True)
        if is_uri(self.name):
            filesystem, root = _storage(self.name)
            path = posixpath.join(root, file)
            if filesystem.exists(path):
                filesystem.rm_file(path)


def is_uri(folder: str | Path) -> bool:
    """Whether a folder is named by a URI and not by a path."""
    return "://" in str(folder)


def below(folder: str, name: str) -> str:
    """The name of what lies in a folder."""
    return posixpath.join(folder, name) if is_uri(folder) else str(Path(folder) / name)


@contextmanager
def opened(folder: str | Path, *names: str) -> Iterator[Place]:
    """A folder within a block. Of one at a URI a copy is made, of the files that are called one of `names`, by default
    of all; it goes at the end. One that does not exist is an empty copy.

    Raises ConfigError for a URI that no installed package reads, StoreError if the storage refuses, or holds a file
    whose name leads out of the folder.
    """
    if not is_uri(folder):
        yield Place(str(folder), Path(folder))
        return
    name = str(folder).rstrip("/")
    filesystem, root = _storage(name)
    with tempfile.TemporaryDirectory(prefix="kka-folder-", ignore_cleanup_errors=True) as copy:
        try:
            for path in filesystem.find(root):
                file = path.removeprefix(root).lstrip("/")
                if file and (not names or posixpath.basename(file) in names):
                    if not stays_inside(file):
                        raise StoreError(f"{name} holds a file whose name leads out of it: {file!r}")
                    target = Path(copy) / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(filesystem.cat_file(path))
        except FileNotFoundError:
            pass  # of storages, some list a folder that is not there and some do not
        except OSError as error:
            raise StoreError(f"cannot read {name}: {error}") from error
        yield Place(name, Path(copy))


def _storage(uri: str) -> tuple[Any, str]:
    try:
        filesystem, root = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot open {uri!r}: {error}") from error
    return filesystem, root.rstrip("/")
