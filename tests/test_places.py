"""Folders at URIs, worked with here and kept there."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner

from kka_ray.cli import app
from kka_ray.errors import AssetError, ConfigError, DataError, ResourceError, StoreError
from kka_ray.housekeeping import collect
from kka_ray.places import below, is_uri, opened
from kka_ray.scoring import detector_folder
from kka_ray.store import Store


@pytest.fixture
def folder() -> str:
    return f"memory://{uuid.uuid4().hex}/runs"


def write(folder: str, file: str, text: str = "x") -> None:
    with fsspec.open(below(folder, file), "w") as stream:
        stream.write(text)


def read(folder: str, file: str) -> str:
    with fsspec.open(below(folder, file), "r") as stream:
        return str(stream.read())


def test_a_folder_here_is_worked_with_in_place(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with opened(tmp_path) as place:
        assert (place.name, place.here) == (str(tmp_path), tmp_path)
        place.keep()
        place.remove("a")
    assert list(tmp_path.iterdir()) == []
    assert below(str(tmp_path), "a/b") == str(tmp_path / "a" / "b")
    assert not is_uri(tmp_path)


def test_a_folder_at_a_uri_is_copied_and_kept(folder: str) -> None:
    write(folder, "a.json", "1")
    write(folder, "detector/b.json", "2")
    with opened(folder + "/") as place:
        assert place.name == folder
        assert (place.here / "detector" / "b.json").read_text() == "2"
        (place.here / "detector" / "b.json").write_text("3")
        (place.here / "c").write_text("4")
        place.keep()
        place.remove("a.json")
    assert not place.here.exists()
    assert (read(folder, "detector/b.json"), read(folder, "c")) == ("3", "4")
    with opened(folder, "b.json") as place:
        assert [p.name for p in place.here.rglob("*") if p.is_file()] == ["b.json"]
    with opened(folder) as place:
        assert not (place.here / "a.json").exists()


def test_a_folder_that_is_not_there_is_empty(folder: str) -> None:
    with opened(folder) as place:
        assert list(place.here.iterdir()) == []


def test_what_is_named_last_is_written_last(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    filesystem = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(filesystem, "pipe_file", lambda self, path, *_, **__: written.append(path.rsplit("/", 1)[-1]))
    with opened(folder) as place:
        for name in ("summary.json", "a", "references.json", "z"):
            (place.here / name).write_text("x")
        place.keep("references.json", "summary.json")
    assert written == ["a", "z", "references.json", "summary.json"]


def test_a_storage_that_refuses_is_an_error_with_a_remedy(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", refuse)
    with opened(folder) as place:
        (place.here / "a").write_text("x")
        with pytest.raises(ResourceError, match=rf"cannot write a to {folder}: .*No space left.*same command again"):
            place.keep()
    with pytest.raises(ConfigError, match="cannot open 'nowhere://x'"), opened("nowhere://x"):
        pass


def test_what_a_storage_raises_beside_oserrors_is_an_error_as_well(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoCredentialsError(Exception):
        """As botocore's."""

    def refuse(*_: Any, **__: Any) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    filesystem = type(fsspec.filesystem("memory"))
    for name in ("find", "pipe_file", "rm_file"):
        monkeypatch.setattr(filesystem, name, refuse)
    with pytest.raises(StoreError, match=f"cannot read {folder}: Unable to locate credentials"), opened(folder):
        pass
    monkeypatch.setattr(filesystem, "find", lambda *_, **__: [])
    with opened(folder) as place:
        (place.here / "a").write_text("x")
        with pytest.raises(ResourceError, match="cannot write a to .*Unable to locate credentials"):
            place.keep()
        with pytest.raises(ResourceError, match="cannot remove a from .*Unable to locate credentials"):
            place.remove("a")


def test_only_what_is_named_is_written(folder: str) -> None:
    for name in ("report.html", "summary.json"):
        write(folder, name, "old")
    with opened(folder) as place:
        for name in ("report.html", "summary.json"):
            (place.here / name).write_text("new")
        place.keep(only=("report.html",))
    assert (read(folder, "report.html"), read(folder, "summary.json")) == ("new", "old")


def test_what_goes_while_it_is_copied_hides_nothing_else(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/references.json", "b/references.json"):
        write(folder, name, "[]")
    filesystem = type(fsspec.filesystem("memory"))
    cat_file = filesystem.cat_file

    def cat(self: Any, path: str, *rest: Any, **named: Any) -> Any:
        if path.endswith("a/references.json"):
            raise FileNotFoundError(path)
        return cat_file(self, path, *rest, **named)

    monkeypatch.setattr(filesystem, "cat_file", cat)
    with opened(folder) as place:
        assert place.vanished == ("a/references.json",)
        assert (place.here / "b" / "references.json").read_text() == "[]"
    with pytest.raises(DataError, match=r"a/references\.json in .* went while it was being read"):
        collect(folder, f"{folder}/store", delete=True)


def test_a_detector_is_found_at_a_uri(folder: str) -> None:
    write(folder, "demo/config.yaml")
    with pytest.raises(AssetError, match="runs/demo has no detector yet"), detector_folder(f"{folder}/demo"):
        pass
    write(folder, "demo/detector/detector.json", "{}")
    write(folder, "demo/records/renderings.parquet")
    for name in ("demo", "demo/detector"):
        with detector_folder(f"{folder}/{name}") as found:
            assert [file.name for file in found.rglob("*")] == ["detector.json"]


def test_housekeeping_sees_the_runs_at_a_uri(folder: str) -> None:
    store = Store(f"{folder}/store")
    keys = [store.get_or_make("fit", 1, {"n": n}, lambda a: a.write("data", b"0")).key for n in range(2)]
    write(folder, "demo/config.yaml")
    write(folder, "demo/references.json", json.dumps([["fit", keys[0]]]))
    states = {entry.key: entry.state for entry in collect(folder, store.uri, delete=True).entries}
    assert states == {keys[0]: "used", keys[1]: "unused"}
    assert [key for _, key in store.names()] == [keys[0]]
    with pytest.raises(DataError, match="nowhere holds no run"):
        collect(f"{folder}-nowhere", store.uri, delete=False)


def test_verbs_say_what_is_missing_at_a_uri(folder: str) -> None:
    result = CliRunner().invoke(app, ["resume", f"{folder}/demo"])
    assert isinstance(result.exception, ConfigError)
    assert f"{folder}/demo holds no run" in str(result.exception)


def test_a_name_that_leads_out_of_the_folder_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder.removeprefix("memory:/")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "find", lambda self, path, **_: [f"{root}/../outside"])
    with pytest.raises(StoreError, match="holds a file whose name leads out of it: '../outside'"), opened(folder):
        pass
