"""Functions of Ray Train workers that fail, for tests."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from kka_ray.errors import ConfigError


def mistake(arguments: dict[str, Any]) -> None:
    """Raises what a user can mend."""
    raise ConfigError("a user's mistake")


def die(arguments: dict[str, Any]) -> None:
    """Ends the process, once Ray Train has seen it start: of a group that it has not, it forgets the places."""
    time.sleep(1)
    os._exit(1)


def die_once(arguments: dict[str, Any]) -> None:
    """Ends the process, unless there is the mark that it leaves."""
    mark = Path(arguments["mark"])
    if not mark.exists():
        mark.touch()
        die(arguments)
