"""Whole runs on a local cluster with the real small models."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from kka_ray import assets

MODELS = ("builtin:smollm2-135m-instruct", "builtin:minilm-l6-v2", "builtin:efficientnet-lite0", "builtin:flowers")
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"kind": "flowers", "normals": 60, "test_normals": 10, "test_anomalies": 10},
    "describe": {"prompts": 2, "examples": 3, "chunk": 8, "guard": {"normal_vocabulary": True}},
    "render": {"steps": 2, "chunk": 8, "normals": 8},
    # Everything that lies beyond the normals counts as hard or easy by chance here: the pairs are what matters.
    "confusion": {"upper": 8, "gap": 0, "evaluator": {"kind": "knn"}},
    "preference": {
        "steps": 1,
        "warmup": 0,
        "batch": 2,
        "micro_batch": 2,
        "min_pairs": 1,
        "rejected": ["easy", "guarded"],
    },
    "loop": {"lines": 16, "rounds": 1, "budget": 0.1},
    "detect": {
        "detectors": [{"kind": "knn"}, {"kind": "fused"}],
        "headline": "fused",
        "seeds": 1,
        "controls": ["noise", "drawn_normals"],
        "views": 2,
    },
    "cluster": {"samplers": {"cpus": 0.25}, "renderers": {"cpus": 0.25}},
}
TIMES = ("wall_seconds", "seconds", "fit_seconds")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(assets.is_present(m) for m in MODELS), reason="the built-in models are missing: run `kka setup`"
    ),
]


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    options = [part for o in overrides for part in ("-o", o)]
    return subprocess.Popen(
        [sys.executable, "-m", "kka_ray.cli", "run", "tiny.yaml", *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def summary(folder: Path) -> Any:
    return without_times(json.loads((folder / "runs" / "tiny" / "summary.json").read_text()))


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
