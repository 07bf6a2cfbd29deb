"""Content-addressed outputs of stages, on any fsspec storage.

An output is a folder of files under `STORE/STAGE/KEY/`. Its key is a hash of everything that determines its content,
so an output that is there need not be made again, by this run or by any other. Files are written into a folder of the
attempt's own; the marker `committed.json`, written last, names that folder and the SHA-256 of each file. An output
without a marker does not exist. Of two attempts at the same output the first marker stays, and the other attempt is
discarded: what was once read does not change, even where a stage does not repeat bit for bit. Object stores know no
write of what is absent alone, so there two attempts that end within the same moment may both write, the later one over
the earlier.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import posixpath
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kka_ray.errors import ResourceError, StoreError
from kka_ray.files import stays_inside

_MARKER = "committed.json"
_SEEN_WITHIN = 60.0
"""Seconds that an output which another machine has committed may take to be seen: for so long a mounted file system may
remember that it was not there when it was looked for last (NFS's `acdirmax`)."""


def stage_key(stage: str, version: int, inputs: Mapping[str, Any]) -> str:
    """The key of a stage's output: 24 hex digits of SHA-256 over the stage, its version and all that it depends on.

    `inputs` must be JSON-serialisable: the stage's configuration, the keys of the outputs it reads, the identities of
    its models, its dtype and thread count, the versions of the libraries that compute.
    """
    text = json.dumps({"stage": stage, "version": version, "inputs": inputs}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Output:
    """A committed output. Files are checked against their SHA-256 as they are read."""

    store: Store
    stage: str
    key: str
    marker: dict[str, Any]

    @property
    def seconds(self) -> float:
        """How long it took to make, wall time."""
        return float(self.marker["seconds"])

    @property
    def files(self) -> list[str]:
        """Names of the files in it."""
        return sorted(self.marker["files"])

    def read(self, name: str) -> bytes:
        """The content of a file. Raises StoreError if it is missing or damaged."""
        if name not in self.marker["files"]:
            raise StoreError(f"{self.stage}/{self.key} has no file {name!r}; it has {self.files}")
        path = self.store.path(self.stage, self.key, self.marker["attempt"], name)
        try:
            content = self.store.filesystem.cat_file(path)
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing although it was committed; delete {self.stage}/{self.key}") from error
        if hashlib.sha256(content).hexdigest() != self.marker["files"][name]:
            raise StoreError(f"{path} is damaged (SHA-256 differs); delete {self.stage}/{self.key} and run again")
        return content

    def table(self, name: str = "data") -> pa.Table:
        """The table that was written under `name`."""
        return pq.read_table(io.BytesIO(self.read(f"{name}.parquet")))

    def array(self, name: str) -> np.ndarray:
        """The array that was written under `name`."""
        return np.load(io.BytesIO(self.read(f"{name}.npy")), allow_pickle=False)

    def json(self, name: str) -> Any:
        """The JSON value that was written under `name`."""
        return json.loads(self.read(f"{name}.json"))

    def download(self, folder: Path) -> Path:
        """Copies every file into `folder`, in the same sub-folders, and returns it.

        Raises StoreError if a file is missing or damaged, or its name leads out of the folder.
        """
        for name in self.files:
            if not stays_inside(name):
                raise StoreError(f"{self.stage}/{self.key} in {self.store.uri} names a file outside of it: {name!r}")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(name))
        return folder

    @cached_property
    def local(self) -> Path:
        """A folder on this machine with the files: the store's own where that is local, else a copy that is there as
        long as the store."""
        if self.store.is_local:
            for name in self.files:
                self.read(name)
            return Path(self.store.path(self.stage, self.key, self.marker["attempt"]))
        return self.store.local_copy(self)


@dataclass
class Attempt:
    """An output in the making. Nothing of it can be read before it is committed."""

    store: Store
    stage: str
    key: str
    name: str = field(default_factory=lambda: f"attempt-{uuid.uuid4().hex[:12]}")
    files: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file; `name` may hold sub-folders."""
        path = self.store.path(self.stage, self.key, self.name, name)
        self.store.put(path, content)
        self.files[name] = hashlib.sha256(content).hexdigest()

    def table(self, table: pa.Table, name: str = "data") -> None:
        """Writes a table as Parquet."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.write(f"{name}.parquet", buffer.getvalue())

    def array(self, array: np.ndarray, name: str) -> None:
        """Writes an array as a NumPy file, without pickles."""
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        self.write(f"{name}.npy", buffer.getvalue())

    def json(self, value: Any, name: str) -> None:
        """Writes a JSON value. NaN is refused: JSON has none."""
        self.write(f"{name}.json", (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def folder(self, folder: Path) -> None:
        """Writes every file below a local folder."""
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.write(file.relative_to(folder).as_posix(), file.read_bytes())


class Store:
    """Outputs of stages below a URI (`/path`, `file:///path`, `s3://bucket/prefix`, `memory://...`)."""

    def __init__(self, uri: str, leases: Callable[[str, str], AbstractContextManager[None]] | None = None) -> None:
        """`leases(stage, key)` waits until nobody else makes that output (`kka_ray.cluster.leases`)."""
        self.uri = uri
        self.used: set[tuple[str, str]] = set()
        """(stage, key) of every output that was found or committed: what a run refers to."""
        self._leases = leases
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        try:
            self.filesystem, root = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise StoreError(f"cannot open the store {uri!r}: {error}") from error
        self.root = root.rstrip("/")
        self.is_local = "file" in self.filesystem.protocol

    def path(self, *parts: str) -> str:
        """A path inside the store."""
        return posixpath.join(self.root, *parts)

    def put(self, path: str, content: bytes) -> None:
        """Writes a whole file. Raises ResourceError if the storage is full or refuses."""
        try:
            self.filesystem.makedirs(posixpath.dirname(path), exist_ok=True)
            self.filesystem.pipe_file(path, content)
        except Exception as error:  # whatever the package for this kind of storage raises
            raise ResourceError(
                f"cannot write {path} ({len(content) / 1e6:.1f} MB): {error}. Free some room or move the store "
                "(`-o store.uri=...`), then run the same command again: finished stages are not repeated"
            ) from error

    def has(self, stage: str, key: str) -> bool:
        """Whether there is an output, without reading it or referring to it."""
        return bool(self.filesystem.exists(self.path(stage, key, _MARKER)))

    def find(self, stage: str, key: str) -> Output | None:
        """The output if it was committed, else None. Raises StoreError if the storage refuses."""
        path = self.path(stage, key, _MARKER)
        try:
            marker = json.loads(self.filesystem.cat_file(path))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError:
            return None  # a marker cut short by a full disk: its output was never committed
        except Exception as error:  # whatever the package for this kind of storage raises
            raise StoreError(
                f"cannot read the store {self.uri}: {type(error).__name__}: {error}. Give access to it, or name "
                "another with -o store.uri=..."
            ) from error
        self.used.add((stage, key))
        return Output(self, stage, key, marker)

    def reported(self, stage: str, key: str) -> Output:
        """An output that another process says it has committed; waits until this one sees it.

        Raises StoreError if that takes more than a minute.
        """
        asked = time.monotonic()
        while (found := self.find(stage, key)) is None:
            if time.monotonic() - asked > _SEEN_WITHIN:
                raise StoreError(
                    f"{stage}/{key} was made by another process but is not in the store {self.uri} as it is seen from "
                    "here; name storage that all nodes share, as in -o store.uri=s3://BUCKET/kka or a mounted folder"
                )
            time.sleep(1)
        return found

    def local_copy(self, output: Output) -> Path:
        """A copy of an output on this machine, one for all who ask; it goes with the store."""
        if self._copies is None:
            self._copies = tempfile.TemporaryDirectory(prefix="kka-store-", ignore_cleanup_errors=True)
        folder = Path(self._copies.name) / output.stage / output.key
        if not folder.exists():
            partial = folder.with_name(f".{output.key}-{uuid.uuid4().hex[:8]}")
            output.download(partial)
            partial.rename(folder)
        return folder

    def commit(self, attempt: Attempt, inputs: Mapping[str, Any]) -> Output:
        """Writes the marker, after which the output exists. `inputs` is what its key was made of.

        Where another attempt was first, this one is discarded and the output is the other's. Raises ResourceError if
        the storage is full or refuses.
        """
        marker = {
            "attempt": attempt.name,
            "files": attempt.files,
            "inputs": dict(inputs),
            "seconds": round(time.perf_counter() - attempt.started, 3),
        }
        content = (json.dumps(marker, indent=1, sort_keys=True) + "\n").encode()
        if self.is_local:
            self._link_marker(attempt, content)
        elif self.find(attempt.stage, attempt.key) is None:
            self.put(self.path(attempt.stage, attempt.key, _MARKER), content)
        output = self.find(attempt.stage, attempt.key)
        if output is None:
            raise StoreError(f"{attempt.stage}/{attempt.key} was removed from {self.uri} as it was committed")
        if output.marker["attempt"] != attempt.name:
            self.discard(attempt)
        return output

    def _link_marker(self, attempt: Attempt, content: bytes) -> None:
        """Puts a whole marker in its place, unless there is one that can be read."""
        path = Path(self.path(attempt.stage, attempt.key, _MARKER))
        temporary = path.with_name(f".{attempt.name}.json")
        self.put(str(temporary), content)
        try:
            os.link(temporary, path)  # unlike a rename it replaces nothing
        except FileExistsError:
            if self.find(attempt.stage, attempt.key) is None:  # cut short
                temporary.replace(path)
        except OSError as error:
            raise ResourceError(
                f"cannot link {path}: {error}. A store lies on a file system with hard links, or at a URI such as "
                "s3://BUCKET/kka"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def get_or_make(
        self, stage: str, version: int, inputs: Mapping[str, Any], make: Callable[[Attempt], None]
    ) -> Output:
        """The output for these inputs, made by `make(attempt)` if it is not there.

        An exception of `make` leaves no output behind and is passed on.
        """
        key = stage_key(stage, version, inputs)
        found = self.find(stage, key)
        if found is not None:
            return found
        with self.lease(stage, key):
            found = self.find(stage, key) if self._leases else None
            if found is not None:
                return found
            attempt = Attempt(self, stage, key)
            try:
                make(attempt)
            except BaseException:
                self.discard(attempt)
                raise
            # What fails here may have failed after the marker was written: the attempt may be the output by now.
            return self.commit(attempt, inputs)

    def lease(self, stage: str, key: str) -> AbstractContextManager[None]:
        """The right to make an output, within a block; at once where the store has no leases."""
        return self._leases(stage, key) if self._leases else nullcontext()

    def discard(self, attempt: Attempt) -> None:
        """Deletes what an attempt wrote."""
        path = self.path(attempt.stage, attempt.key, attempt.name)
        if self.filesystem.exists(path):
            self.filesystem.rm(path, recursive=True)

    def outputs(self) -> Iterator[Output]:
        """Every committed output."""
        for stage, key in self.names():
            found = self.find(stage, key)
            if found is not None:
                yield found

    def names(self) -> Iterator[tuple[str, str]]:
        """(stage, key) of everything with a marker; reads none of them."""
        root = self.path()
        if self.is_local:
            paths = self.filesystem.glob(f"{glob.escape(root)}/*/*/{_MARKER}")
        else:
            # One listing of everything: a pattern would ask a storage for each folder by itself.
            paths = [path for path in self.filesystem.find(root) if path.endswith(f"/{_MARKER}")]
        depth = root.rstrip("/").count("/") + 3
        for path in sorted(path for path in paths if path.count("/") == depth):
            stage, key = path.split("/")[-3:-1]
            yield stage, key

    def size(self, *parts: str) -> int:
        """Bytes of a file, or of everything below a folder, without what goes while it is looked at."""
        # Unlike `du` it asks for no file once more after it was listed.
        found = self.filesystem.find(self.path(*parts), detail=True)
        return sum(int(info.get("size") or 0) for info in found.values())

    def remove(self, stage: str, key: str) -> None:
        """Deletes an output: its marker first, so that no reader finds half of it."""
        marker = self.path(stage, key, _MARKER)
        if self.filesystem.exists(marker):
            self.filesystem.rm(marker)
        self.filesystem.rm(self.path(stage, key), recursive=True)

    def free_bytes(self) -> int | None:
        """Free bytes on a local store's disk; None where the storage does not say."""
        if not self.is_local:
            return None
        folder = Path(self.root)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free
