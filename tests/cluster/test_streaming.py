"""The pools of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kka_ray.cluster.streaming import Pools, sampler_libraries
from kka_ray.config.models import RunConfig
from kka_ray.describe import sampler as samplers
from kka_ray.errors import ConfigError


class _Pool:
    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.stopped = error, 0

    def stop(self) -> None:
        self.stopped += 1
        if self.error:
            raise self.error


def test_every_pool_is_stopped_even_if_another_cannot_be() -> None:
    pools = _Pool(ConnectionError("the cluster is gone")), _Pool()
    with pytest.raises(ConnectionError, match="the cluster is gone"):
        Pools.close(SimpleNamespace(samplers=pools[0], renderers=pools[1]))  # type: ignore[arg-type]
    assert [pool.stopped for pool in pools] == [1, 1]


def test_an_engine_that_ray_installs_for_the_samplers_need_not_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise samplers.PackageNotFoundError(name)

    monkeypatch.setattr(samplers, "version", missing)
    values = {"name": "x", "data": {"kind": "flowers"}, "describe": {"sampler": {"kind": "vllm"}}}
    with pytest.raises(ConfigError, match="not installed here"):
        sampler_libraries(RunConfig.model_validate(values))
    values["cluster"] = {"samplers": {"gpus": 1, "runtime_env": {"pip": ["vllm==0.32.0"]}}}
    assert sampler_libraries(RunConfig.model_validate(values)) == {"pip": ["vllm==0.32.0"]}
