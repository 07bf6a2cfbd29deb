"""How much memory a process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or fewer where it is in a container or another control
    group with a limit."""
    return min([physical_memory(), *_limits()])


def _limits() -> Iterator[int]:
    """The limits of this process's control groups, of version 1 and 2, and of all that those lie in."""
    for folder, name in _memory_groups():
        # A container may see its own group as the root, while its path is that outside: what is not there is skipped.
        for group in (folder, *folder.parents):
            if group.is_relative_to(_GROUPS):
                with suppress(OSError, ValueError):  # the word max, where there is none
                    yield int((group / name).read_text())


def _memory_groups() -> Iterator[tuple[Path, str]]:
    """The folders of this process's groups that may limit memory, each with the name of the file with the limit."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield _GROUPS / path.lstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            yield _GROUPS / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
