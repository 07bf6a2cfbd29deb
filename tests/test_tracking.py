"""What is written to MLflow, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kka_ray import experiment, tracking
from kka_ray.cluster.streaming import Drawn
from kka_ray.config.loading import parse
from kka_ray.config.models import RunConfig
from kka_ray.confusion.judge import JudgeResult, LatentMap
from kka_ray.errors import ConfigError, ResourceError
from kka_ray.loop import LoopResult, Round
from kka_ray.records import Description


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


def _config(uri: str) -> RunConfig:
    return RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}, "tracking": {"uri": uri}})


@pytest.mark.parametrize("uri", ["http://me:secret@host:5000", "postgresql://mlflow:secret@db/mlflow"])
def test_a_password_in_the_address_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri: .*a password.*PGPASSWORD") as error:
        parse({"name": "x", "data": {"kind": "flowers"}, "tracking": {"uri": uri}}, RunConfig, "a file")
    assert "secret" not in str(error.value)
    assert _config("postgresql://mlflow@db/mlflow").tracking.uri


def test_a_server_that_does_not_answer_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    config = _config("http://127.0.0.1:9")
    with pytest.raises(ResourceError, match=r"http://127.0.0.1:9 does not take .*tracking\.uri=URI"):
        tracking.check(config)
    with pytest.raises(ResourceError, match="does not take the results"):
        tracking.log_run(config, {"config_hash": "h", "rounds": []}, Path())


def test_what_is_told_after_long_work_may_be_lost_but_not_the_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    uri = "http://127.0.0.1:9"
    for tell in (
        lambda: tracking.end_run(uri, "r", {}, failed=True),
        lambda: tracking.log_metrics(uri, "r", {"loss": 1.0}, 1),
        lambda: tracking.log_artifact(uri, "r", Path(__file__), "samples"),
    ):
        caplog.clear()
        with tracking.unless_unreachable():
            tell()
        assert "does not take the results" in caplog.text
        with pytest.raises(ResourceError, match="does not take the results"):
            tell()


def test_a_file_needs_no_check(tmp_path: Path) -> None:
    tracking.check(_config(f"sqlite:///{tmp_path / 'there' / 'mlflow.db'}"))
    assert not (tmp_path / "there").exists()


def test_a_deleted_experiment_is_said_before_the_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = _config(f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracking.log_run(config, {"config_hash": "h", "rounds": []}, tmp_path)
    tracking.check(config)
    client = MlflowClient(config.tracking.uri)
    number = client.get_experiment_by_name("kka").experiment_id
    client.delete_experiment(number)
    with pytest.raises(
        ResourceError, match=rf"'kka' .*deleted.* restore --experiment-id {number}`.*tracking\.experiment"
    ):
        tracking.check(config)
    client.restore_experiment(number)
    tracking.check(config)


def test_a_run_with_lost_rows_is_tracked(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    lost = 'error: the worker\'s process died [3 times], "it" said'
    descriptions = [Description("r0-p0-s0", "p0", 0, "", "", "rejected", r) for r in (lost, "error: other", "exact")]
    none = np.zeros((0, 2), np.float32)
    audit = JudgeResult([], {}, None, LatentMap(none, none, none, none))
    played = Round(0, descriptions, Drawn(), [], "ok", None, 0.5, 0.5, 1.0, 9.0, {}, {})
    row = experiment._round(played, LoopResult([], [played], audit, {}))
    assert row["rejected"] == {"error": 2, "exact": 1}
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = tracking.log_run(_config(uri), {"config_hash": "h", "rounds": [row]}, tmp_path)
    assert MlflowClient(uri).get_run(run).data.metrics["round/rejected.error"] == 2
