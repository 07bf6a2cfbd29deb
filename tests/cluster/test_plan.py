"""Plans: what fits is placed, what does not is named, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kka_ray.cluster.estimate import estimate, total
from kka_ray.cluster.plan import Plan, make_plan, weights_bytes
from kka_ray.cluster.streaming import computes_on, render_config, sample_config, sampler_config
from kka_ray.config import load
from kka_ray.config.models import ClusterConfig, FlowersData, LoopConfig, PoolConfig, PreferenceConfig, RunConfig
from kka_ray.errors import AssetError, ResourceError
from kka_ray.store import Attempt, Store


def config(rounds: int = 2, **cluster: object) -> RunConfig:
    return RunConfig(
        name="x",
        data=FlowersData(kind="flowers"),
        loop=LoopConfig(rounds=rounds),
        cluster=ClusterConfig(**cluster),  # type: ignore[arg-type]
    )


def plan(rounds: int = 2, **cluster: object) -> Plan:
    return make_plan(config(rounds, **cluster))


def gpus(count: float, **options: object) -> PoolConfig:
    return PoolConfig(gpus=count, cpus=0, **options)  # type: ignore[arg-type]


def test_the_default_fits_two_cores() -> None:
    plan().check([{"CPU": 2.0}])


def test_what_is_missing_is_named() -> None:
    wanted = plan(samplers=PoolConfig(workers=3, gpus=0.5, cpus=0))
    with pytest.raises(
        ResourceError, match=r"(?s)samplers: 3 x .*1.5 GPU at once; the cluster has node 0: 2 CPU, 1 GPU"
    ):
        wanted.check([{"CPU": 2.0, "GPU": 1.0}])


def test_a_process_must_fit_one_node() -> None:
    wanted = plan(train_gpus=2)
    with pytest.raises(ResourceError, match="DPO workers"):
        wanted.check([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}])
    wanted.check([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}])


def test_detectors_are_fitted_on_cpus_and_hold_no_gpu() -> None:
    shares = {share.name: share for phase in plan(train_gpus=1).phases for share in phase.shares}
    assert shares["DPO workers"].gpus == 1
    assert shares["detector workers"].gpus == 0


def test_dpo_workers_that_may_share_a_gpu_are_refused() -> None:
    shared = {"cluster": ClusterConfig(train_gpus=0.4), "preference": PreferenceConfig(workers=2)}
    with pytest.raises(ValueError, match=r"set cluster\.train_gpus=1 or preference\.workers=1"):
        RunConfig(name="x", data=FlowersData(kind="flowers"), **shared)  # type: ignore[arg-type]


def test_a_fraction_must_fit_one_gpu() -> None:
    wanted = plan(samplers=gpus(0.6, workers=3))
    with pytest.raises(ResourceError, match="samplers"):
        wanted.check([{"CPU": 8.0, "GPU": 2.0}])
    wanted.check([{"CPU": 8.0, "GPU": 3.0}])


def test_one_gpu_is_shared_by_fractions_or_in_turns() -> None:
    node = {"CPU": 8.0, "GPU": 1.0, "node:10.0.0.1": 1.0, "node:__internal_head__": 1.0}
    plan(samplers=gpus(0.4), renderers=gpus(0.3), train_gpus=0.3).check([node])
    whole = {"samplers": gpus(1), "renderers": gpus(1), "train_gpus": 1}
    with pytest.raises(ResourceError, match="colocated"):
        plan(**whole).check([node])
    places = plan(mode="colocated", **whole).place([node])
    assert places == {
        ("describe", "samplers"): {"10.0.0.1": 1},
        ("render", "renderers"): {"10.0.0.1": 1},
        ("prefer", "DPO workers"): {"10.0.0.1": 1},
        ("detect", "detector workers"): {"10.0.0.1": 1},
    }


def test_large_processes_are_placed_first_and_over_the_nodes() -> None:
    wanted = plan(samplers=gpus(1, workers=2), renderers=gpus(0.5, workers=2), train_gpus=2, mode="disjoint")
    nodes = [{"CPU": 8.0, "GPU": 2.0, f"node:10.0.0.{i}": 1.0} for i in (1, 2, 3)]
    places = wanted.place(nodes)
    assert places["describe, render and prefer", "DPO workers"] == {"10.0.0.1": 1}
    assert places["describe, render and prefer", "samplers"] == {"10.0.0.2": 2}
    assert places["describe, render and prefer", "renderers"] == {"10.0.0.3": 2}


def test_without_rounds_there_is_no_training_of_the_language_model() -> None:
    assert [p.name for p in plan(rounds=0).phases] == ["describe and render", "detect"]


def test_weights_must_fit_the_memory() -> None:
    wanted = plan()
    with pytest.raises(ResourceError, match="of memory a process for its weights"):
        wanted.check([{"CPU": 8.0, "memory": 1e6}])
    wanted.check([{"CPU": 8.0, "memory": 8e9}])


def test_the_time_is_that_of_the_same_stages_before(tmp_path: Path) -> None:
    store, asked = Store(str(tmp_path)), config(rounds=0)
    assert [e.seconds for e in estimate(asked, store)] == [None, None, None, None]

    def record(stage: str, inputs: dict[str, object], seconds: float) -> None:
        attempt = Attempt(store, stage, f"key-{seconds}")
        attempt.started -= seconds
        store.commit(attempt, inputs)

    known = {"config": sample_config(asked), "sampler": sampler_config(asked), "threads": 1}
    record("sample", {**known, "prompts": [["p", "x", 2], ["q", "x", 2]]}, 8.0)
    record("sample", {**known, "config": {"another": 1}, "prompts": [["p", "x", 1]]}, 80.0)
    record("render", {"config": render_config(asked), "threads": 1, "rows": [[], []]}, 1.0)
    record("dpo", {"config": asked.preference.training(), "threads": 2}, 3.0)
    for k, detector in enumerate(asked.detect.detectors):
        record("fit", {"detector": detector.model_dump(mode="json")}, 0.5 + k / 1000)
    found = {e.stage: e.seconds for e in estimate(asked, store)}
    assert found["describe"] == pytest.approx(256 * 2.0, rel=0.01)
    assert found["render"] == pytest.approx((256 + 128) * 0.5, rel=0.01)
    assert found["prefer"] == 0
    assert found["detect"] == pytest.approx(6 * 3 * 3 * 0.5, rel=0.01)
    rows = estimate(asked, store)
    assert total(rows, turns=False) == pytest.approx(512 + 27, rel=0.01)
    assert total(rows, turns=True) == pytest.approx(512 + 192 + 27, rel=0.01)


def test_keys_tell_what_is_computed_on() -> None:
    asked = ClusterConfig()
    on_gpu, on_cpu = computes_on(gpus(0.5), asked), computes_on(PoolConfig(), asked)
    assert on_gpu == "cuda"
    assert on_cpu.startswith("cpu")
    assert computes_on(gpus(0.5), ClusterConfig(device="cpu")) == on_cpu


CONFIGS = Path(__file__).parents[2] / "configs" / "gpu"
NODES = {
    "qwen2.5-7b_sdxl-turbo": [{"CPU": 8.0, "GPU": 3.0}],
    "llama3.1-8b_sdxl": [{"CPU": 16.0, "GPU": 8.0}],
    "glm4-9b_sdxl-turbo_shared": [{"CPU": 8.0, "GPU": 1.0}],
}
"""The cluster that each configuration says it is for."""


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.stem)
def test_a_shipped_gpu_run_fits_its_cluster_and_fills_it(file: Path) -> None:
    wanted = make_plan(load(file, RunConfig, ["data.path=x"]))
    nodes = NODES[file.stem]
    wanted.check(nodes)
    assert max(phase.gpus for phase in wanted.phases) == pytest.approx(sum(n["GPU"] for n in nodes))
    with pytest.raises(ResourceError, match="does not fit"):
        wanted.check([{"CPU": n["CPU"], "GPU": n["GPU"] - 0.5} for n in nodes])


@pytest.mark.parametrize(
    ("files", "loaded"),
    [
        (["model.safetensors", "model.fp16.safetensors", "onnx/model.safetensors"], ["model.safetensors"]),
        (
            ["model_index.json", "all.safetensors", "unet/a.safetensors", "unet/a.fp16.safetensors"],
            ["unet/a.safetensors"],
        ),
        (["model_index.json", "all.safetensors", "unet/a.fp16.safetensors"], ["unet/a.fp16.safetensors"]),
        (
            ["first.safetensors", "second.safetensors", "consolidated.safetensors"],
            ["first.safetensors", "second.safetensors"],
        ),
    ],
)
def test_only_what_is_loaded_weighs(tmp_path: Path, files: list[str], loaded: list[str]) -> None:
    for number, name in enumerate(files):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 10**number)
    if "consolidated.safetensors" in files:
        index = {"weight_map": {"a": "first.safetensors", "b": "second.safetensors", "c": "first.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_bytes(str(tmp_path)) == sum((tmp_path / name).stat().st_size for name in loaded)


def test_a_model_without_one_of_its_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first.safetensors").write_bytes(b"x")
    index = {"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AssetError, match=r"second\.safetensors is missing"):
        weights_bytes(str(tmp_path))
    monkeypatch.setattr("kka_ray.assets.here", lambda _: tmp_path)
    assert weights_bytes("hub:org/name") is None, "the rest is fetched as the model is loaded"


@pytest.mark.parametrize("text", ['{"metadata"', "{}", "[]", '{"weight_map": []}'])
def test_a_damaged_index_of_weights_is_an_error_with_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(AssetError, match=r"model\.safetensors\.index\.json is damaged"):
        weights_bytes(str(tmp_path))
