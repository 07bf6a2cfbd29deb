"""A run's folder: whose it is, and paths that hold wherever a process works."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from kka_ray import assets, experiment
from kka_ray.config import RunConfig, config_hash, load
from kka_ray.data.decode import encode_png
from kka_ray.errors import ConfigError, DataError, ResourceError, StoreError
from kka_ray.experiment import absolute, claim, computing
from kka_ray.places import Place, opened
from kka_ray.prepare import prepare
from kka_ray.store import Store


def run_config(**values: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "x", "data": {"kind": "flowers"}} | values)


def at(folder: Path) -> Place:
    return Place(str(folder), folder)


def test_every_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = run_config(
        data={"kind": "folder", "path": "screws", "description": "a screw", "captions": "captions.csv"},
        backbone={"model": "models/backbone"},
        describe={"sampler": {"kind": "transformers", "model": "models/llm"}},
        render={"pipeline": "../pipeline"},
        detect={"outside": "others"},
        tracking={"uri": "sqlite:///tracked.db"},
        store={"uri": "kept"},
        output="runs",
    )
    found = absolute(given)
    here = str(tmp_path)
    assert found.data.model_dump(include={"path", "captions"}) == {"path": f"{here}/screws", "captions": "captions.csv"}
    assert found.backbone.model == f"{here}/models/backbone"
    assert found.describe.sampler.model == f"{here}/models/llm"
    assert found.render.pipeline == str(tmp_path.parent / "pipeline")
    assert found.detect.outside == f"{here}/others"
    assert found.tracking.uri == f"sqlite:///{here}/tracked.db"
    assert (found.store.uri, found.output) == (f"{here}/kept", f"{here}/runs")
    assert absolute(found) == found


def test_what_is_no_relative_path_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    given = run_config(
        data={"kind": "cifar100", "path": str(tmp_path / "link")},
        describe={"sampler": {"kind": "api", "base_url": "http://localhost:8000/v1", "model": "org/llm"}},
        loop={"rounds": 0},
        render={"pipeline": "hub:org/pipeline"},
        tracking={"uri": "http://tracking:5000"},
        store={"uri": "s3://bucket/kka"},
        output=str(tmp_path / "runs"),
    )
    assert absolute(given) == given
    assert absolute(run_config(output="/runs", store={"uri": "/s"})) == run_config(output="/runs", store={"uri": "/s"})


def test_a_run_is_kept_at_a_uri_whose_results_a_server_tracks() -> None:
    given = run_config(output="s3://bucket/runs", tracking={"uri": "http://tracking:5000"}, store={"uri": "/s"})
    assert absolute(given) == given
    with pytest.raises(ValidationError, match=r"output is the URI s3://bucket/runs.*tracking\.uri=http"):
        run_config(output="s3://bucket/runs")


def test_a_run_that_is_kept_at_a_uri_is_known_there() -> None:
    tracked = {"tracking": {"uri": "http://tracking:5000"}, "output": f"memory://{uuid.uuid4().hex}"}
    folder = f"{tracked['output']}/x"
    with opened(folder, "config.yaml", "config_hash") as place:
        claim(place, run_config(**tracked), "first")
        (place.here / "references.json").write_text("[]")
        place.keep()
    with opened(folder, "config.yaml", "config_hash") as place:
        assert claim(place, run_config(**tracked), "second") == "first"
    with opened(folder) as place:
        assert sorted(file.name for file in place.here.iterdir()) == ["config.yaml", "config_hash"]
        with pytest.raises(ConfigError, match=rf"{folder} holds a run with another configuration \(seed\)"):
            claim(place, run_config(seed=1, **tracked), "second")


def test_a_run_goes_on_in_other_places_and_its_file_says_so(tmp_path: Path) -> None:
    vllm = {"kind": "vllm", "gpu_memory": 0.9}
    claim(at(tmp_path), run_config(describe={"sampler": vllm}, cluster={"samplers": {"gpus": 1}}), "first")
    moved = run_config(
        describe={"sampler": vllm | {"gpu_memory": 0.5}},
        cluster={"samplers": {"gpus": 1}, "start_timeout": 60, "max_failed_share": 0.9},
        store={"uri": "s3://bucket/kka"},
        tracking={"experiment": "other"},
        output="/elsewhere",
    )
    claim(at(tmp_path), moved, "first")
    assert load(tmp_path / "config.yaml", RunConfig) == moved


def test_a_run_keeps_the_hash_that_it_was_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "x"
    written = run_config(data={"kind": "cifar100", "path": "cifar100"})
    first = claim(at(folder), absolute(written), config_hash(written))
    assert first == config_hash(written)
    resumed = load(folder / "config.yaml", RunConfig)
    assert config_hash(resumed) != first
    assert claim(at(folder), absolute(resumed), config_hash(resumed)) == first


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ResourceError, match=r"cannot write the run's folder .*runs/x.*Free some room"):
        claim(at(tmp_path / "runs" / "x"), run_config(), "first")


def test_a_run_computes_with_the_threads_of_its_configuration() -> None:
    before = torch.get_num_threads()
    with computing(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_run_that_an_older_release_began_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = run_config(data={"kind": "cifar100", "path": "cifar100"})
    values = config.model_dump(mode="json")
    del values["detect"]["views"]  # a field that it did not have; and it left the data's path as it was
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    claim(at(tmp_path), absolute(config), "first")
    assert load(tmp_path / "config.yaml", RunConfig) == absolute(config)


def test_a_run_with_other_results_is_refused_by_the_keys_that_differ(tmp_path: Path) -> None:
    claim(at(tmp_path), run_config(), "first")
    before = (tmp_path / "config.yaml").read_text()
    (tmp_path / "references.json").write_text("[]")
    other = run_config(seed=1, confusion={"upper": 6}, cluster={"in_flight": 3})
    with pytest.raises(ConfigError, match=r"another configuration \(confusion\.upper, seed\).*-o name=NAME"):
        claim(at(tmp_path), other, "first")
    assert (tmp_path / "config.yaml").read_text() == before
    assert (tmp_path / "references.json").exists()


def test_a_folder_whose_run_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\ndata: {kind: flowers}\ngone: 1\n")
    with pytest.raises(ConfigError, match=r"(?s)cannot be gone on with.*-o name=NAME.*gone: unknown key"):
        claim(at(tmp_path), run_config(), "first")


def test_a_run_that_is_started_again_refers_to_everything(tmp_path: Path) -> None:
    from kka_ray.housekeeping import collect
    from kka_ray.store import Store

    store = Store(str(tmp_path / "store"))
    keys = [store.get_or_make("fit", 1, {"n": n}, lambda a: a.write("data", b"0")).key for n in range(2)]
    claim(at(tmp_path / "x"), run_config(), "first")
    (tmp_path / "x" / "references.json").write_text(json.dumps([["fit", keys[0]]]))
    claim(at(tmp_path / "x"), run_config(), "first")
    assert {e.state for e in collect(tmp_path, store.uri, delete=True).entries} == {"held"}
    assert all(store.find("fit", key) for key in keys)


def test_a_run_is_named_by_what_was_written_wherever_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kka_ray import experiment

    config = run_config(data={"kind": "cifar100", "path": "cifar100"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar100").mkdir()
    for split in ("train", "test"):
        (tmp_path / "cifar100" / f"{split}-0.parquet").touch()
    seen: list[str] = []

    class Stop(Exception):
        pass

    def summarise(config: RunConfig, hash_: str, *_: Any) -> Any:
        assert config.data.model_dump()["path"] == str(tmp_path / "cifar100")
        seen.append(hash_)
        raise Stop

    monkeypatch.setattr(experiment, "summarise", summarise)
    for name in (
        "make_plan",
        "session",
        "nodes",
        "Pools",
        "prepare",
        "warnings",
        "Loop",
        "evaluate",
        "headline_detector",
    ):
        monkeypatch.setattr(experiment, name, Anything())
    with pytest.raises(Stop):
        experiment.run(config, lambda *_: None, lambda text: None)
    assert seen == [config_hash(config)]


class Anything:
    """Stands in for what the test is not about."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __iter__(self) -> Any:
        return iter(())


def test_the_tilde_is_the_user_s_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = absolute(
        run_config(
            output="~/runs",
            store={"uri": "~/store"},
            tracking={"uri": "sqlite:///~/mlflow.db"},
            render={"pipeline": "~/renderer"},
        )
    )
    assert (config.output, config.store.uri, config.render.pipeline) == (
        "/home/ada/runs",
        "/home/ada/store",
        "/home/ada/renderer",
    )
    assert config.tracking.uri == "sqlite:////home/ada/mlflow.db"


def test_a_library_that_half_of_a_run_later_is_missing_is_named_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "find_spec", lambda _: None)
    config = run_config(output=str(tmp_path), preference={"load_in_4bit": True})
    with pytest.raises(ConfigError, match=r"bitsandbytes.*'\.\[quantised\]'"):
        experiment.run(config, lambda *_: None, print)
    assert list(tmp_path.iterdir()) == []
    elsewhere = {"train_runtime_env": {"pip": ["bitsandbytes"]}}
    experiment.check_libraries(run_config(preference={"load_in_4bit": True}, cluster=elsewhere))


def test_outside_images_that_are_not_there_are_named_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "claim", lambda *_: pytest.fail("the run began"))
    (tmp_path / "empty").mkdir()
    for folder, said in (("gone", "is no folder"), ("empty", "holds 0 images")):
        detect = {"controls": ["outside"], "outside": str(tmp_path / folder)}
        with pytest.raises(DataError, match=rf"detect\.outside: .*/{folder} {said}.*out of detect\.controls"):
            experiment.run(run_config(output=str(tmp_path / "runs"), detect=detect), lambda *_: None, pytest.fail)
    assert not (tmp_path / "runs").exists()


def test_too_few_outside_images_end_a_run_before_a_line_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = tmp_path / "others"
    others.mkdir()
    for n in range(3):
        (others / f"{n}.png").write_bytes(encode_png(np.full((8, 8, 3), 80 * n, np.uint8)))

    class FakeLoop(Anything):
        budget = 3

        def run(self) -> Any:
            raise Began

    class Began(Exception):
        pass

    for name in ("make_plan", "session", "nodes", "Pools", "prepare", "warnings"):
        monkeypatch.setattr(experiment, name, Anything())
    monkeypatch.setattr(experiment, "Loop", lambda *_, **__: FakeLoop())
    detect = {"controls": ["outside"], "outside": str(others)}
    config = run_config(output=str(tmp_path / "runs"), store={"uri": str(tmp_path / "store")}, detect=detect)
    with pytest.raises(Began):
        experiment.run(config, lambda *_: None, pytest.fail)
    FakeLoop.budget = 4
    with pytest.raises(DataError, match=r"detect\.outside: .*holds 3 images, but 4 outside images are wanted"):
        experiment.run(config, lambda *_: None, pytest.fail)


def test_the_name_of_a_run_that_wrote_no_line_is_free_for_it_when_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_images(config: RunConfig, _: Store) -> None:
        raise DataError(f"seed {config.seed}")

    for name in ("make_plan", "session", "nodes", "Pools"):
        monkeypatch.setattr(experiment, name, Anything())
    monkeypatch.setattr(experiment, "prepare", no_images)
    there = {"output": str(tmp_path / "runs"), "store": {"uri": str(tmp_path / "store")}}
    for seed in (0, 1):
        with pytest.raises(DataError, match=f"seed {seed}"):
            experiment.run(run_config(seed=seed, **there), lambda *_: None, pytest.fail)
    assert not (tmp_path / "runs" / "x").exists()
    claim(at(tmp_path / "runs" / "x"), run_config(seed=2), "begun")  # and then interrupted
    with pytest.raises(DataError, match="seed 2"):
        experiment.run(run_config(seed=2, **there), lambda *_: None, pytest.fail)
    assert (tmp_path / "runs" / "x" / "config.yaml").is_file()


def test_a_data_set_that_is_not_there_is_said_before_anything_is_made(tmp_path: Path) -> None:
    there = {"output": str(tmp_path / "runs"), "store": {"uri": str(tmp_path / "store")}}
    (tmp_path / "empty").mkdir()
    for data, said in (
        ({"kind": "cifar100", "path": str(tmp_path / "none")}, "none is not a folder"),
        ({"kind": "folder", "path": str(tmp_path / "none"), "description": "a screw"}, "none does not exist"),
        ({"kind": "folder", "path": str(tmp_path / "empty"), "description": "a screw"}, "holds no image"),
    ):
        with pytest.raises(DataError, match=said):
            experiment.run(run_config(data=data, **there), lambda *_: None, pytest.fail)
    assert [f.name for f in tmp_path.iterdir()] == ["empty"]


def test_a_run_that_its_store_its_room_its_tracking_or_its_cluster_refused_leaves_its_name_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ResourceError("refused")

    there = {"output": str(tmp_path / "runs")}
    with pytest.raises(StoreError, match="nosuch"):
        experiment.run(run_config(store={"uri": "nosuch://x"}, **there), lambda *_: None, pytest.fail)
    assert not (tmp_path / "runs" / "x").exists()
    config = run_config(store={"uri": str(tmp_path / "store")}, **there)
    for owner, name in ((experiment, "check_room"), (experiment.tracking, "check"), (experiment, "session")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(ResourceError, match="refused"):
                experiment.run(config, lambda *_: None, pytest.fail)
        assert not (tmp_path / "runs" / "x").exists(), name


@pytest.mark.skipif(not assets.is_present("builtin:efficientnet-lite0"), reason="run `kka setup`")
def test_a_renderer_is_checked_against_the_normals_at_its_own_image_size(tmp_path: Path) -> None:
    trained = tmp_path / "trained"  # as `kka renderer train` leaves it
    shutil.copytree(assets.SHIPPED["flowers"], trained)
    store = Store(str(tmp_path / "store"))

    def said(pipeline: str, size: int, **data: object) -> list[str]:
        values = {
            "backbone": {"image_size": size},
            "render": {"pipeline": pipeline},
            "data": {"kind": "flowers", **data},
        }
        config = run_config(**values, detect={"detectors": [{"kind": "knn"}], "headline": "knn"})
        return experiment.warnings(config, store, prepare(config, store))

    for size in (32, 64, 224):
        assert said("builtin:flowers", size, normals=30) == []
    noise = tmp_path / "noise" / "train" / "good"
    noise.mkdir(parents=True)
    for n in range(20):
        image = np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (noise / f"{n}.png").write_bytes(encode_png(image))
    there = {"kind": "folder", "path": str(tmp_path / "noise"), "description": "noise"}
    for pipeline in ("builtin:flowers", str(trained)):
        (warning,) = said(pipeline, 64, **there)
        assert "was trained on other images than noise" in warning
    (trained / "reference.safetensors").unlink()
    assert said(str(trained), 64, **there) == []
