"""Ray Train jobs that do not get what they need."""

from __future__ import annotations

import pytest

from kka_ray.cluster import train
from kka_ray.config.models import ClusterConfig
from kka_ray.errors import ResourceError
from tests.integration.failing_jobs import mistake


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
