"""States of jobs, kept beside the output that is being made: whoever goes on with it, here or elsewhere, finds them."""

from __future__ import annotations

import uuid
from contextlib import suppress

from kka_ray.store import Store


class Checkpoints:
    """The states of the making of one output, each replaced as a whole. One process of a job writes, all may read.

    Two runs may make the same output at once: each then goes on from whichever state was written last.
    """

    def __init__(self, store: Store, stage: str, key: str) -> None:
        self._store = store
        self._folder = store.path(stage, key, "checkpoint")

    def read(self, name: str) -> bytes | None:
        """The last state that was written under a name, None if there is none."""
        try:
            return bytes(self._store.filesystem.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Replaces a state. Raises ResourceError if the storage is full or refuses."""
        partial = f"{self._path(name)}.{uuid.uuid4().hex[:8]}.partial"
        self._store.put(partial, content)
        with suppress(FileNotFoundError):  # another run has made the output and cleared the folder
            self._store.filesystem.mv(partial, self._path(name))

    def clear(self) -> None:
        """Deletes all of them, once the output is there."""
        if self._store.filesystem.exists(self._folder):
            with suppress(FileNotFoundError):  # another run clears it as well
                self._store.filesystem.rm(self._folder, recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}.safetensors"
