from pathlib import Path

import pytest

from kka_ray.cluster.plan import make_plan
from kka_ray.config import load
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


CONFIGS = Path(__file__).parents[2] / "configs" / "gpu"
NODES = {
    "qwen2.5-7b_sdxl-turbo": [{"CPU": 8.0, "GPU": 3.0}],
    "llama3.1-8b_sdxl": [{"CPU": 16.0, "GPU": 8.0}],
    "glm4-9b_sdxl-turbo_shared": [{"CPU": 8.0, "GPU": 1.0}],
}
"""The cluster that each configuration says it is for."""


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.stem)
def test_a_shipped_gpu_run_fits_its_cluster_and_fills_it(file: Path) -> None:
    plan = make_plan(load(file, RunConfig, ["data.path=x"]))
    nodes = NODES[file.stem]
    plan.check(nodes)
    assert plan.gpus == pytest.approx(sum(n["GPU"] for n in nodes))
    with pytest.raises(ResourceError, match="does not fit"):
        plan.check([{"CPU": n["CPU"], "GPU": n["GPU"] - 0.5} for n in nodes])
