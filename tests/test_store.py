import gc
import json
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from kka_ray.errors import ResourceError, StoreError
from kka_ray.store import Attempt, Output, Store, stage_key


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}")


def test_made_once_then_found(store: Store) -> None:
    calls = []

    def make(attempt: Attempt) -> None:
        calls.append(1)
        attempt.table(pa.table({"x": [1, 2]}))
        attempt.json({"a": 1.5}, "value")
        attempt.write("folder/raw.bin", b"abc")

    first = store.get_or_make("stage", 1, {"seed": 0}, make)
    again = store.get_or_make("stage", 1, {"seed": 0}, make)
    assert calls == [1]
    assert again.table()["x"].to_pylist() == [1, 2]
    assert again.json("value") == {"a": 1.5}
    assert (again.local / "folder" / "raw.bin").read_bytes() == b"abc"
    assert [o.key for o in store.outputs()] == [first.key]


def test_a_remote_output_is_copied_once_and_the_copy_goes_with_the_store(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}")
    made = store.get_or_make("stage", 1, {}, lambda a: a.write("folder/file", b"abc"))
    copy = made.local
    assert (copy / "folder" / "file").read_bytes() == b"abc"
    found = store.find("stage", made.key)
    assert found is not None
    assert found.local == copy
    del made, found, store
    gc.collect()
    assert not copy.exists()


def test_a_file_whose_name_leads_out_of_the_output_is_refused(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}")
    made = store.get_or_make("stage", 1, {}, lambda a: a.write("../../outside", b"abc"))
    with pytest.raises(StoreError, match=r"names a file outside of it: '\.\./\.\./outside'"):
        made.download(tmp_path / "copy")
    assert not (tmp_path / "outside").exists()


def test_what_a_worker_reports_is_waited_for_and_explained_if_nobody_else_sees_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mounted file system may remember for a while that something was not there."""
    key = store.get_or_make("stage", 1, {}, lambda a: a.json([], "x")).key
    read, clock = store.filesystem.cat_file, SimpleNamespace(now=0.0)

    def stale(path: str) -> bytes:
        if clock.now < 50:
            raise FileNotFoundError(path)
        return read(path)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr("kka_ray.store.time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    monkeypatch.setattr(store.filesystem, "cat_file", stale)
    assert store.reported("stage", key).key == key
    asked = clock.now
    with pytest.raises(StoreError, match="storage that all nodes share"):
        store.reported("stage", "another")
    assert 60 < clock.now - asked < 70


def test_every_input_changes_the_key() -> None:
    keys = {
        stage_key("a", 1, {"x": 1}),
        stage_key("b", 1, {"x": 1}),
        stage_key("a", 2, {"x": 1}),
        stage_key("a", 1, {"x": 2}),
    }
    assert len(keys) == 4
    assert stage_key("a", 1, {"x": 1, "y": 2}) == stage_key("a", 1, {"y": 2, "x": 1})


def test_a_failure_leaves_nothing_behind(store: Store) -> None:
    def fail(attempt: Attempt) -> None:
        attempt.json([1], "part")
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        store.get_or_make("stage", 1, {}, fail)
    assert list(store.outputs()) == []
    assert store.get_or_make("stage", 1, {}, lambda a: a.json([2], "part")).json("part") == [2]


def test_files_without_a_marker_do_not_exist(store: Store) -> None:
    key = stage_key("stage", 1, {})
    Attempt(store, "stage", key).json([1], "part")
    assert store.find("stage", key) is None


def test_damage_is_noticed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    output = store.get_or_make("stage", 1, {}, lambda a: a.write("file", b"content"))
    (tmp_path / "stage" / output.key / output.marker["attempt"] / "file").write_bytes(b"CONTENT")
    with pytest.raises(StoreError, match="damaged"):
        output.read("file")
    with pytest.raises(StoreError, match="damaged"):
        _ = output.local


def test_a_cut_marker_counts_as_none(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    output = store.get_or_make("stage", 1, {}, lambda a: a.write("file", b"content"))
    marker = tmp_path / "stage" / output.key / "committed.json"
    marker.write_text(marker.read_text()[:20])
    assert store.find("stage", output.key) is None


def test_of_two_attempts_the_first_stays_and_the_other_is_discarded(store: Store) -> None:
    key = stage_key("stage", 1, {})
    first, second = Attempt(store, "stage", key), Attempt(store, "stage", key)
    first.write("file", b"what a reader may have read")
    second.write("file", b"something else")
    read = store.commit(first, {})
    lost = store.commit(second, {})
    assert lost.marker == read.marker
    found = store.find("stage", key)
    assert found is not None
    assert found.read("file") == b"what a reader may have read"
    folder = store.path("stage", key)
    left = {path.rsplit("/", 1)[-1] for path in store.filesystem.ls(folder, detail=False)}
    assert left == {first.name, "committed.json"}
    store.remove("stage", key)
    assert store.get_or_make("stage", 1, {}, lambda a: a.write("file", b"new")).read("file") == b"new"


def test_an_output_stays_though_reading_it_back_failed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its marker may be there, whatever is raised: without its files the output could never be read."""
    find, asked = store.find, []

    def unreachable(stage: str, key: str) -> Output | None:
        asked.append(key)
        if find(stage, key) is not None:
            raise StoreError("the storage does not answer")
        return find(stage, key)

    monkeypatch.setattr(store, "find", unreachable)
    with pytest.raises(StoreError, match="does not answer"):
        store.get_or_make("stage", 1, {}, lambda a: a.write("file", b"content"))
    monkeypatch.undo()
    again = store.get_or_make("stage", 1, {}, lambda a: pytest.fail("it is there"))
    assert again.key in asked
    assert again.read("file") == b"content"


def test_a_cut_marker_is_replaced(store: Store) -> None:
    first = store.get_or_make("stage", 1, {}, lambda a: a.write("file", b"old"))
    marker = store.path("stage", first.key, "committed.json")
    store.filesystem.pipe_file(marker, store.filesystem.cat_file(marker)[:20])
    assert store.get_or_make("stage", 1, {}, lambda a: a.write("file", b"new")).read("file") == b"new"
    found = store.find("stage", first.key)
    assert found is not None
    assert found.read("file") == b"new"


def test_many_that_commit_at_once_agree(tmp_path: Path) -> None:
    key, start = stage_key("stage", 1, {}), threading.Barrier(8)

    def attempt(number: int) -> bytes:
        attempt = Attempt(Store(str(tmp_path)), "stage", key)
        attempt.write("file", b"%d" % number)
        start.wait(timeout=20)
        return attempt.store.commit(attempt, {}).read("file")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(attempt, range(8)))) == 1


def test_a_full_disk_is_said_and_leaves_no_output(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ResourceError, match="cannot write"):
            store.get_or_make("stage", 1, {}, lambda a: a.write("file", b"x" * 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(store.outputs()) == []


def test_nan_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        store.get_or_make("stage", 1, {}, lambda a: a.json(float("nan"), "value"))


def test_the_marker_tells_what_it_was_made_of(tmp_path: Path) -> None:
    output = Store(str(tmp_path)).get_or_make("stage", 1, {"seed": 7}, lambda a: a.json([], "x"))
    marker = json.loads((tmp_path / "stage" / output.key / "committed.json").read_text())
    assert marker["inputs"] == {"seed": 7}
    assert output.seconds >= 0


def test_a_storage_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    store = Store(str(tmp_path / "file" / "store"))
    with pytest.raises(StoreError, match=r"cannot read the store .*file/store.*-o store\.uri"):
        store.find("fit", "k")
    remote = Store("memory://refusing")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Unable to locate credentials")  # as botocore: no OSError

    for name in ("cat_file", "pipe_file"):
        monkeypatch.setattr(remote.filesystem, name, refuse)
    with pytest.raises(StoreError, match="Unable to locate credentials"):
        remote.find("fit", "k")
    with pytest.raises(ResourceError, match="Unable to locate credentials"):
        remote.put("/refusing/x", b"x")


@pytest.mark.parametrize("name", ["runs[1]", "a*b", "what?", "[a-z]"])
def test_a_store_whose_path_looks_like_a_pattern_is_not_empty(tmp_path: Path, name: str) -> None:
    store = Store(str(tmp_path / name))
    made = store.get_or_make("x", 1, {}, lambda attempt: attempt.json(1, "value"))
    assert list(store.names()) == [("x", made.key)]
