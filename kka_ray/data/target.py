"""A folder that is made whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kka_ray.errors import DataError, ResourceError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into within the block. It becomes `target` at the end, or goes if that is not reached.

    Raises DataError if `target` is there and is not an empty folder, or is the current folder or a mount point, which
    cannot be replaced; ResourceError if the disk is full or refuses.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} is there already and is not an empty folder; name another target or delete it")
    folder = target.resolve()  # a link leads to a folder that can be replaced, and cannot itself
    if folder == Path.cwd() or folder.is_mount():
        raise DataError(f"{target} is the current folder or a mount point, which cannot be replaced; name one in it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            work = Path(temporary) / "out"
            work.mkdir()
            yield work
            if folder.exists():
                folder.rmdir()
            shutil.move(work, folder)
    except OSError as error:
        raise ResourceError(f"cannot write {target} ({error}); give access or make room, then try again") from error
