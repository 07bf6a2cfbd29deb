"""The undisturbed run, and the count of what was done to the others."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.chaos.killing import PATIENT
from tests.integration.tiny_run import finish, models_are_missing, start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chaos)
            item.add_marker(pytest.mark.skipif(models_are_missing(), reason="models are missing: run `kka setup`"))


@dataclass
class Tally:
    """Runs that were disturbed and ended with the undisturbed result, and the kills they took."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)

    def add(self, kills: Counter[str]) -> None:
        self.runs += 1
        self.kills += kills


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Counts over the suite; written to the file $KKA_CHAOS_RESULT, where that is set."""
    counted, started = Tally(), time.monotonic()
    yield counted
    file = os.environ.get("KKA_CHAOS_RESULT")
    if file:
        result = {
            "kills": dict(sorted(counted.kills.items())),
            "kills_in_all": counted.kills.total(),
            "runs_with_the_undisturbed_result": counted.runs,
            "failed_tests": request.session.testsfailed,
            "minutes": round((time.monotonic() - started) / 60, 1),
        }
        Path(file).write_text(json.dumps(result, indent=1) + "\n")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(folder, *PATIENT), 1800)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> Callable[[], Path]:
    """A new folder each time it is called."""
    numbers = iter(range(1000))
    return lambda: tmp_path / str(next(numbers))
