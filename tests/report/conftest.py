from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report import fake_run


@pytest.fixture
def write_fake_run(tmp_path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Writes a fake run's folder, as `fake_run.write` takes its options; returns the folder and its summary."""

    def write(**options: Any) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / "fake-demo"
        return folder, fake_run.write(folder, **options)

    return write
