"""Whole runs on a local cluster with the real small models."""

import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.tiny_run import finish, models_are_missing, start, summary

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(models_are_missing(), reason="the built-in models are missing: run `kka setup`"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    output = finish(start(folder))
    assert "report.html" in output.replace("\n", "")
    return folder


def test_a_run_leaves_complete_records(undisturbed: Path) -> None:
    found = summary(undisturbed)
    assert found["auc"]["zeroth"]["per_seed"]
    assert [r["described"] for r in found["rounds"]] == [16, 16]
    records = undisturbed / "runs" / "tiny" / "records"
    descriptions = pq.read_table(records / "descriptions.parquet").to_pandas()
    renderings = pq.read_table(records / "renderings.parquet").to_pandas()
    verdicts = pq.read_table(records / "verdicts.parquet").to_pandas()
    assert len(descriptions) == 32
    assert descriptions.id.is_unique
    assert set(renderings.id) == set(descriptions.id[descriptions.status == "ok"])
    assert set(verdicts.id) == set(renderings.id[renderings.status == "ok"])
    assert (undisturbed / "runs" / "tiny" / "report.html").stat().st_size > 10_000
    assert (undisturbed / "runs" / "mlflow.db").is_file()


def test_the_same_command_again_makes_nothing_anew(undisturbed: Path) -> None:
    markers = {p: p.stat().st_mtime_ns for p in (undisturbed / "runs" / "store").glob("*/*/committed.json")}
    before = summary(undisturbed)
    finish(start(undisturbed))
    assert summary(undisturbed) == before
    assert {p: p.stat().st_mtime_ns for p in (undisturbed / "runs" / "store").glob("*/*/committed.json")} == markers


@pytest.mark.parametrize("stage", ["flowers", "sample", "render", "fit"])
def test_a_killed_run_is_finished_by_the_same_command(undisturbed: Path, tmp_path: Path, stage: str) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "runs" / "store").glob(f"{stage}/*/committed.json")):
        assert time.monotonic() < deadline, "the stage was never reached"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish(start(tmp_path))
    assert summary(tmp_path) == summary(undisturbed)


def test_another_configuration_in_the_same_folder_is_refused(undisturbed: Path) -> None:
    process = start(undisturbed, "loop.rounds=0")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "another configuration" in output
