"""Folders of runs: on this machine, or at any fsspec URI with a copy here while they are worked with.

What takes room and must survive a crash lies in the store. A run's folder is written at the run's end, so at a URI it
is written from a copy, the summary last.
"""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from kka_ray.errors import ConfigError, KkaError, ResourceError, StoreError
from kka_ray.files import absolute_path, stays_inside

DETECTOR_FILES = ("config.yaml", "detector.json", "detector.safetensors")
"""What a detector needs of a run's folder."""

_AGAIN = ". Mend that, then run the same command again: finished stages are not repeated"


@dataclass(frozen=True)
class Place:
    """A folder: its name, a path or a URI, and where it is on this machine.

    `vanished`: files at a URI that were removed while it was being copied.
    """

    name: str
    here: Path
    vanished: tuple[str, ...] = ()

    def keep(self, *last: str, only: Collection[str] | None = None) -> None:
        """Writes the files that are here to where the folder is kept, those named `last` after all others.

        `only`: names of those to write, by default all. Raises ResourceError if the storage is full or refuses.
        """
        if not is_uri(self.name):
            return
        files = [p.relative_to(self.here).as_posix() for p in sorted(self.here.rglob("*")) if p.is_file()]
        filesystem, root = _storage(self.name)
        for file in sorted(files, key=lambda f: last.index(f) + 1 if f in last else 0):
            if only is not None and file not in only:
                continue
            path = posixpath.join(root, file)
            with _refused(ResourceError, f"cannot write {file} to {self.name}", _AGAIN):
                filesystem.makedirs(posixpath.dirname(path), exist_ok=True)
                filesystem.pipe_file(path, (self.here / file).read_bytes())

    def remove(self, file: str) -> None:
        """Deletes a file, if it is there. Raises ResourceError if the storage refuses."""
        (self.here / file).unlink(missing_ok=True)
        if is_uri(self.name):
            filesystem, root = _storage(self.name)
            path = posixpath.join(root, file)
            with _refused(ResourceError, f"cannot remove {file} from {self.name}", _AGAIN), suppress(FileNotFoundError):
                filesystem.rm_file(path)


def is_uri(folder: str | Path) -> bool:
    """Whether a folder is named by a URI and not by a path."""
    return "://" in str(folder)


def below(folder: str, name: str) -> str:
    """The name of what lies in a folder."""
    return posixpath.join(folder, name) if is_uri(folder) else str(Path(folder) / name)


def is_same(folder: str | Path, other: str | Path) -> bool:
    """Whether two names, paths or URIs, are of one folder. Raises ConfigError for a URI that no installed package
    reads."""
    return _real(folder) == _real(other)


def _real(folder: str | Path) -> tuple[Any, str]:
    if is_uri(folder):
        filesystem, root = _storage(str(folder))
        if "file" not in filesystem.protocol:
            return filesystem, root
        folder = root
    return None, str(Path(absolute_path(str(folder))).resolve())


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
        listed: list[str] = []
        vanished = []
        with _refused(StoreError, f"cannot read {name}"):
            with suppress(FileNotFoundError):  # of storages, some list a folder that is not there and some do not
                listed = list(filesystem.find(root))
            for path in listed:
                file = path.removeprefix(root).lstrip("/")
                if file and (not names or posixpath.basename(file) in names):
                    if not stays_inside(file):
                        raise StoreError(f"{name} holds a file whose name leads out of it: {file!r}")
                    target = Path(copy) / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        target.write_bytes(filesystem.cat_file(path))
                    except FileNotFoundError:
                        vanished.append(file)
        yield Place(name, Path(copy), tuple(vanished))


@contextmanager
def _refused(kind: type[KkaError], what: str, remedy: str = "") -> Iterator[None]:
    """Whatever a storage's package raises within the block becomes an error of `kind`: not all of it is an OSError."""
    try:
        yield
    except KkaError:
        raise
    except Exception as error:
        raise kind(f"{what}: {error}{remedy}") from error


def _storage(uri: str) -> tuple[Any, str]:
    try:
        filesystem, root = fsspec.core.url_to_fs(uri)
    except Exception as error:  # whatever the package for this kind of storage raises
        raise ConfigError(f"cannot open {uri!r}: {error}") from error
    return filesystem, root.rstrip("/")
