"""Whole runs on a local cluster with the real small models."""

import json
import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.integration.tiny_run import finish, kka, markers, models_are_missing, resume, start, summary

pytestmark = pytest.mark.skipif(models_are_missing(), reason="the built-in models are missing: run `kka setup`")


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


@pytest.mark.slow
def test_the_same_command_again_makes_nothing_anew(undisturbed: Path) -> None:
    made, before = markers(undisturbed), summary(undisturbed)
    finish(start(undisturbed))
    assert summary(undisturbed) == before
    assert markers(undisturbed) == made


def test_the_summary_has_the_fields_that_others_read(undisturbed: Path) -> None:
    found = json.loads((undisturbed / "runs" / "tiny" / "summary.json").read_text())
    assert found.keys() >= {
        *("config_hash", "versions", "auc", "rounds", "wall_seconds"),
        *("described_fraction", "drawn_fraction", "generated_fraction"),
    }
    for arm in ("zeroth", "kka"):
        assert found["auc"][arm].keys() == {"mean", "std", "per_seed"}
    for row in found["rounds"]:
        assert row.keys() >= {
            *("described", "unique", "rejected", "rendered", "failed", "hard", "easy", "normal_like", "hard_rate"),
            *("diversity", "distinct_2", "perplexity", "status", "seconds", "dpo"),
        }
    assert [r["status"] for r in found["rounds"]] == ["ok", "ok"], "the tiny run is to train its policy"
    assert found["rounds"][1]["dpo"].keys() == {"pairs", "steps", "loss_first", "loss_last", "margin"}


_STAGES = ("flowers", "features", "prompts", "sample", "drift", "render", "judge", "pairs", "dpo", "fit", "the end")


@pytest.mark.slow
@pytest.mark.parametrize("stage", _STAGES)
def test_a_killed_run_is_finished_and_makes_nothing_twice(undisturbed: Path, tmp_path: Path, stage: str) -> None:
    """Killed as the stage has its first output, and at the end as the run's folder is written."""
    process = start(tmp_path)
    wanted = "runs/tiny/records/*.parquet" if stage == "the end" else f"runs/store/{stage}/*/committed.json"
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(wanted)):
        assert time.monotonic() < deadline, "the stage was never reached"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = markers(tmp_path)
    finish(start(tmp_path) if stage != "dpo" else resume(tmp_path))
    assert {path: changed for path, changed in markers(tmp_path).items() if path in before} == before
    assert summary(tmp_path) == summary(undisturbed)


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_run_that_is_kept_at_a_uri_is_read_from_there(undisturbed: Path, tmp_path: Path) -> None:
    kept = f"file://{tmp_path}/kept/runs"
    options = (f"output={kept}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    output = finish(start(undisturbed, *options))
    assert f"{kept}/tiny/report.html" in output.replace("\n", "")
    assert summary(tmp_path / "kept") == summary(undisturbed)
    folder = tmp_path / "kept" / "runs" / "tiny"
    assert files(folder) == files(undisturbed / "runs" / "tiny")
    (folder / "report.html").unlink()
    finish(kka(undisturbed, "report", f"{kept}/tiny"))
    assert (folder / "report.html").stat().st_size > 10_000
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (64, 64), "red").save(images / "red.png")
    for model, scores in ((f"{kept}/tiny", "there"), ("runs/tiny", "here")):
        finish(kka(undisturbed, "score", str(images), "--model", model, "--output", str(tmp_path / scores)))
    assert (tmp_path / "there" / "scores.csv").read_text() == (tmp_path / "here" / "scores.csv").read_text()
    assert "nothing can go" in finish(kka(undisturbed, "gc", "--output", kept, "--store", "runs/store"))
    assert finish(kka(undisturbed, "resume", f"{kept}/tiny"))


@pytest.mark.slow
def test_another_configuration_in_the_same_folder_is_refused(undisturbed: Path) -> None:
    process = start(undisturbed, "loop.rounds=0")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "another configuration" in output
