import pytest

from kka_ray.cluster.plan import make_plan
from kka_ray.config.models import ClusterConfig, FlowersData, PoolConfig, RunConfig
from kka_ray.errors import ResourceError


def config(**cluster: object) -> RunConfig:
    return RunConfig(name="x", data=FlowersData(kind="flowers"), cluster=ClusterConfig(**cluster))  # type: ignore[arg-type]


def test_the_default_fits_two_cores() -> None:
    make_plan(config()).check([{"CPU": 2.0}])


def test_what_is_missing_is_named() -> None:
    plan = make_plan(config(samplers=PoolConfig(workers=3, gpus=0.5, cpus=0)))
    with pytest.raises(ResourceError, match=r"(?s)samplers: 3 x .*1.5 GPU in all; the cluster has 2 CPU and 1 GPU"):
        plan.check([{"CPU": 2.0, "GPU": 1.0}])


def test_a_process_must_fit_one_node() -> None:
    plan = make_plan(config(train_gpus=2))
    with pytest.raises(ResourceError, match="train workers"):
        plan.check([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}])
    plan.check([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}])
