"""What is written to MLflow, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from kka_ray import tracking


def test_artifacts_lie_beside_the_file_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    here, there = tmp_path / "here", tmp_path / "shared" / "tracked"
    here.mkdir()
    monkeypatch.chdir(here)
    uri = f"sqlite:///{there / 'mlflow.db'}"
    run = tracking.start_run(uri, "kka", "a sweep", {"trials": 2})
    file = tmp_path / "sweep.json"
    file.write_text("{}")
    tracking.end_run(uri, run, {"objective": 0.5}, artifacts=[file])
    found = MlflowClient(uri).get_run(run)
    assert (found.info.status, found.data.metrics, found.data.params) == (
        "FINISHED",
        {"objective": 0.5},
        {"trials": "2"},
    )
    assert (there / "mlartifacts" / run / "artifacts" / "sweep.json").read_text() == "{}"
    assert list(here.iterdir()) == []
