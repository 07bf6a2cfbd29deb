"""Ray Train jobs that do not get what they need, and jobs that are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load

from kka_ray.cluster import train
from kka_ray.config.models import ClusterConfig, PreferenceConfig
from kka_ray.errors import ConfigError, ResourceError
from kka_ray.store import Store
from tests.cluster import dpo_jobs
from tests.integration.failing_jobs import mistake
from tests.logical_cluster import wait_for
from tests.preference.tiny import pairs, save_model


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_job_that_gets_no_places_says_what_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    cluster = ClusterConfig(train_cpus=1000, start_timeout=2)
    with pytest.raises(ResourceError, match=r"the job x: 2 x \(1000 CPU, 0 GPU\) were not free within 2 s"):
        train.run("x", mistake, {}, 2, cluster)


def test_a_job_waits_as_often_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    assert [train._waits(ClusterConfig(start_timeout=seconds)) for seconds in (1, 60, 61, 1800)] == [1, 1, 2, 30]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_job_is_started_again_after_a_crash_and_not_after_a_mistake(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        if train.rank()[0] > 0:
            time.sleep(600)  # as one that waits for the first
        attempt = len(list(folder.iterdir()))
        (folder / str(attempt)).touch()
        if attempt == 0:
            os._exit(1)
        raise ConfigError("a user's mistake")

    cluster = ClusterConfig(train_cpus=0.5, max_restarts=3)
    with pytest.raises(ConfigError, match="^a user's mistake$"):
        train.run("x", lambda arguments: work(arguments["folder"]), {"folder": tmp_path}, 2, cluster)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_job_can_be_interrupted_and_ctrl_c_works_after_a_job_as_before(tmp_path: Path) -> None:
    """Ray Train's own handler would exit with status 0, and would swallow Ctrl-C once a job is done."""

    def work(arguments: dict[str, Any]) -> None:
        (arguments["folder"] / arguments["name"]).touch()
        time.sleep(arguments["seconds"])

    def interrupt() -> None:
        while not (tmp_path / "second").exists():
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    arguments = {"folder": tmp_path, "name": "first", "seconds": 0}
    train.run("x", work, arguments, 1, ClusterConfig())
    assert signal.getsignal(signal.SIGINT) is handler
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train.run("x", work, arguments | {"name": "second", "seconds": 600}, 1, ClusterConfig())
    assert signal.getsignal(signal.SIGINT) is handler
    wait_for(lambda: ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"], lambda: "its worker goes on")


def dpo_job(folder: Path, name: str, *, restarts: int = 0, mark: Path | None = None, **settings: Any) -> Any:
    """The output and the workers' reports of a job of two workers on a tiny model; jobs in one folder share a store."""
    model = folder / "model"
    reference = str(model) if model.exists() else save_model(model)
    fixed: dict[str, Any] = {"batch": 4, "micro_batch": 2, "warmup": 0, "learning_rate": 1e-2, "workers": 2}
    config = PreferenceConfig(**fixed, **settings)
    cluster = ClusterConfig(train_cpus=0.5, train_threads=1, max_restarts=restarts)
    store = Store(str(folder / "store"))
    return dpo_jobs.run(store, folder / name, pairs(7), reference, config, cluster, mark)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_killed_dpo_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole, undisturbed = dpo_job(tmp_path, "whole", steps=12)
    found, killed = dpo_job(tmp_path, "killed", steps=12, restarts=1, mark=tmp_path / "mark")
    assert (tmp_path / "mark").exists()
    assert [len(report["seen"]) for report in undisturbed] == [12, 12]
    assert [report["seen"] for report in killed] == [report["seen"][10:] for report in undisturbed]
    assert found.json("result") == whole.json("result")
    assert found.read("adapter/adapter_model.safetensors") == whole.read("adapter/adapter_model.safetensors")
    assert not list((tmp_path / "store").glob("dpo/*/checkpoint"))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_sharded_model_is_trained_as_a_whole_one_and_saved_whole(tmp_path: Path) -> None:
    whole, replicas = dpo_job(tmp_path, "whole", steps=6)
    sharded, reports = dpo_job(tmp_path, "sharded", steps=6, sharding="fsdp")
    assert [report["sharded"] for report in replicas + reports] == [False, False, True, True]
    ours, theirs = ([row["loss"] for row in output.json("result")["history"]] for output in (whole, sharded))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0] - 0.02
    wanted, found = (load(output.read("adapter/adapter_model.safetensors")) for output in (whole, sharded))
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    assert all(torch.allclose(found[k], wanted[k], atol=1e-3) for k in wanted)
    assert reports[0]["adapter"] == reports[1]["adapter"]
