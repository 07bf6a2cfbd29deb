import io
import json
import os
import re
import shutil
import time
import uuid
from pathlib import Path

import pytest
from rich.console import Console

from kka_ray import tracking
from kka_ray.cluster.checkpoints import Checkpoints
from kka_ray.config.models import RunConfig
from kka_ray.errors import DataError
from kka_ray.housekeeping import collect, show_store
from kka_ray.store import Attempt, Store


def _make(store: Store, stage: str, inputs: dict, content: bytes = b"0123456789") -> str:
    return store.get_or_make(stage, 1, inputs, lambda attempt: attempt.write("data", content)).key


def _run(output: Path, name: str, references: list | None) -> None:
    folder = output / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x\n")
    (folder / "config_hash").write_text("h\n")
    if references is not None:
        (folder / "references.json").write_text(json.dumps(references))


@pytest.fixture
def store(tmp_path) -> Store:
    (tmp_path / "runs").mkdir()
    return Store(str(tmp_path / "runs" / "store"))


def _states(inventory) -> dict:
    return {(e.stage, e.key): e.state for e in inventory.entries}


def _age(path: Path, seconds: float) -> None:
    for file in [path, *path.rglob("*")]:
        os.utime(file, (time.time() - seconds,) * 2)


def test_references_are_followed_through_the_markers(store, tmp_path):
    first = _make(store, "pairs", {"pairs": "a"})
    adapter = _make(store, "dpo", {"pairs": first, "previous": None})
    second = _make(store, "pairs", {"pairs": "b"})
    last = _make(store, "dpo", {"pairs": second, "more": [{"previous": adapter}]})
    other = _make(store, "sample", {"adapter": last})
    _run(tmp_path / "runs", "demo", [["dpo", last], ["fit", "0" * 24]])
    inventory = collect(tmp_path / "runs", store.uri, delete=False)
    assert _states(inventory) == {
        ("dpo", adapter): "used",
        ("dpo", last): "used",
        ("pairs", first): "used",
        ("pairs", second): "used",
        ("sample", other): "unused",
    }
    assert {e.runs for e in inventory.entries if e.state == "used"} == {("demo",)}


def test_copies_of_configurations_among_the_tracked_artifacts_are_no_runs(store, tmp_path):
    used, unused = _make(store, "fit", {"n": 1}), _make(store, "fit", {"n": 2})
    _run(tmp_path / "runs", "demo", [["fit", used]])
    values = {"name": "demo", "data": {"kind": "flowers"}, "output": str(tmp_path / "runs")}
    tracking.log_run(RunConfig.model_validate(values), {"config_hash": "h", "rounds": []}, tmp_path / "runs" / "demo")
    assert [*(tmp_path / "runs").glob("mlartifacts/*/artifacts/config.yaml")]
    states = _states(collect(tmp_path / "runs", store.uri, delete=True))
    assert states == {("fit", used): "used", ("fit", unused): "unused"}
    assert store.find("fit", unused) is None


def test_deleting_takes_what_is_unused_and_leaves_the_rest(store, tmp_path):
    used, unused = _make(store, "fit", {"n": 1}), _make(store, "fit", {"n": 2})
    _run(tmp_path / "runs", "demo", [["fit", used]])
    collect(tmp_path / "runs", store.uri, delete=False)
    assert store.find("fit", unused)
    inventory = collect(tmp_path / "runs", store.uri, delete=True)
    assert _states(inventory)["fit", unused] == "unused"
    assert store.find("fit", unused) is None
    assert not Path(store.path("fit", unused)).exists()
    assert store.find("fit", used).read("data") == b"0123456789"
    assert list(_states(collect(tmp_path / "runs", store.uri, delete=True))) == [("fit", used)]


@pytest.mark.parametrize("damaged", [False, True])
def test_an_unfinished_run_holds_every_output(store, tmp_path, damaged):
    used, other = _make(store, "fit", {"n": 1}), _make(store, "fit", {"n": 2})
    _run(tmp_path / "runs", "demo", [["fit", used]])
    _run(tmp_path / "runs", "sweep/broken", None)
    if damaged:
        (tmp_path / "runs" / "sweep" / "broken" / "references.json").write_text('[["fit"')
    inventory = collect(tmp_path / "runs", store.uri, delete=True)
    assert _states(inventory) == {("fit", used): "used", ("fit", other): "held"}
    assert store.find("fit", other)
    text = io.StringIO()
    show_store(inventory, Console(file=text, width=150), deleted=True)
    assert "sweep/broken: not finished, so every output is kept" in text.getvalue()
    assert "deleted 0 entries" in text.getvalue()


def test_a_sweep_in_progress_holds_every_output(store, tmp_path):
    used, other = _make(store, "fit", {"n": 1}), _make(store, "fit", {"n": 2})
    _run(tmp_path / "runs", "demo", [["fit", used]])
    (tmp_path / "runs" / "tried").mkdir()
    (tmp_path / "runs" / "tried" / "sweep.yaml").write_text("name: tried\n")
    inventory = collect(tmp_path / "runs", store.uri, delete=True)
    assert _states(inventory) == {("fit", used): "used", ("fit", other): "held"}
    assert store.find("fit", other)
    (tmp_path / "runs" / "tried" / "references.json").write_text(json.dumps([["fit", other]]))
    assert set(_states(collect(tmp_path / "runs", store.uri, delete=True)).values()) == {"used"}


def test_a_run_that_was_moved_away_and_linked_holds_its_outputs(store, tmp_path):
    key = _make(store, "fit", {"n": 1})
    _run(tmp_path / "elsewhere", "demo", None)
    (tmp_path / "elsewhere" / "demo" / "back").symlink_to(tmp_path / "runs")  # a circle
    (tmp_path / "runs" / "demo").symlink_to(tmp_path / "elsewhere" / "demo")
    inventory = collect(tmp_path / "runs", store.uri, delete=True)
    assert [(e.state, e.runs) for e in inventory.entries] == [("held", ("demo",))]
    assert store.find("fit", key)


def test_nothing_is_deleted_if_a_run_began_while_the_store_was_read(store, tmp_path, monkeypatch):
    key = _make(store, "fit", {"n": 1})
    size = Store.size

    def begins(self: Store, stage: str, key: str) -> int:
        _run(tmp_path / "runs", "new", None)
        return size(self, stage, key)

    monkeypatch.setattr(Store, "size", begins)
    with pytest.raises(DataError, match="began or ended"):
        collect(tmp_path / "runs", store.uri, delete=True)
    assert store.find("fit", key)


def test_old_attempts_go_and_young_ones_stay(store, tmp_path):
    key = _make(store, "fit", {"n": 1})
    _run(tmp_path / "runs", "demo", [["fit", key]])
    superseded, lost, young = Attempt(store, "fit", key), Attempt(store, "render", "a" * 24), Attempt(store, "fit", key)
    for attempt in (superseded, lost, young):
        attempt.write("sub/data", b"x" * 1000)
    marker = Path(store.path("fit", key, f".attempt-{uuid.uuid4().hex[:12]}.json"))
    marker.write_text("{")
    for path in (Path(store.path("fit", key, superseded.name)), Path(store.path("render", "a" * 24)), marker):
        _age(path, 2 * 86400)
    _age(Path(store.path("fit", key, store.find("fit", key).marker["attempt"])), 9 * 86400)
    inventory = collect(tmp_path / "runs", store.uri, delete=True)
    assert _states(inventory) == {
        ("fit", key): "used",
        ("fit", f"{key}/{superseded.name}"): "leftover",
        ("fit", f"{key}/{young.name}"): "growing",
        ("fit", f"{key}/{marker.name}"): "leftover",
        ("render", f"{'a' * 24}/{lost.name}"): "leftover",
    }
    assert {e.size for e in inventory.entries if e.state in ("leftover", "growing")} == {1000, 1}
    left = _states(collect(tmp_path / "runs", store.uri, delete=False))
    assert left == {("fit", key): "used", ("fit", f"{key}/{young.name}"): "growing"}
    assert store.find("fit", key).read("data") == b"0123456789"
    assert not Path(store.path("render", "a" * 24)).exists()


@pytest.mark.parametrize("call", range(1, 41))
def test_what_vanishes_while_the_store_is_read_does_not_end_the_command(store, tmp_path, monkeypatch, call):
    """Another process discards its attempt, or a finished job its checkpoint, at any moment."""
    key = _make(store, "fit", {"n": 1})
    _run(tmp_path / "runs", "demo", [["fit", key]])
    attempt = Attempt(store, "fit", key)
    for name in ("a", "sub/b"):
        attempt.write(name, b"x" * 1000)
    Checkpoints(store, "dpo", "b" * 24).write("training", b"x")
    calls, stat = iter(range(1, call)), os.stat

    def vanishing(path, **options):
        if str(path).startswith(store.root) and next(calls, None) is None:
            for folder in (store.path("fit", key, attempt.name), store.path("dpo")):
                shutil.rmtree(folder, ignore_errors=True)
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", vanishing)
        entries = collect(tmp_path / "runs", store.uri, delete=False).entries
    assert [(e.state, e.size > 0) for e in entries if e.key == key] == [("used", True)]
    assert {e.state for e in entries} <= {"used", "growing"}


def test_old_checkpoints_go_and_young_ones_stay(store, tmp_path):
    for key in ("a" * 24, "b" * 24):
        Checkpoints(store, "dpo", key).write("training", b"x" * 100)
    _age(Path(store.path("dpo", "a" * 24)), 2 * 86400)
    inventory = collect(tmp_path / "runs", store.uri, delete=True)
    assert _states(inventory) == {
        ("dpo", f"{'a' * 24}/checkpoint"): "leftover",
        ("dpo", f"{'b' * 24}/checkpoint"): "growing",
    }
    assert {e.size for e in inventory.entries} == {100}
    assert Checkpoints(store, "dpo", "b" * 24).read("training") == b"x" * 100
    assert not Path(store.path("dpo", "a" * 24)).exists()


def test_an_unfinished_run_holds_the_checkpoints_that_it_goes_on_from(store, tmp_path):
    made = _make(store, "dpo", {"n": 1})
    for key in ("a" * 24, made):
        Checkpoints(store, "dpo", key).write("training", b"x" * 100)
    lost = Attempt(store, "dpo", "a" * 24)
    lost.write("data", b"x")
    _age(Path(store.root), 2 * 86400)
    _run(tmp_path / "runs", "demo", None)
    inventory = collect(tmp_path / "runs", store.uri, delete=True)
    assert _states(inventory) == {
        ("dpo", f"{'a' * 24}/checkpoint"): "held",
        ("dpo", f"{'a' * 24}/{lost.name}"): "leftover",
        ("dpo", made): "held",
        ("dpo", f"{made}/checkpoint"): "leftover",
    }
    assert Checkpoints(store, "dpo", "a" * 24).read("training") == b"x" * 100
    text = io.StringIO()
    show_store(collect(tmp_path / "runs", store.uri, delete=False), Console(file=text, width=150), deleted=False)
    assert re.search(r"│ dpo +│ +1 │ .*│ +2 \(", text.getvalue()), "one output; that and the checkpoints are held"
    assert "demo: not finished, so every output is kept, and what a job goes on from" in text.getvalue()
    (tmp_path / "runs" / "demo" / "references.json").write_text(json.dumps([["dpo", made]]))
    assert _states(collect(tmp_path / "runs", store.uri, delete=True))["dpo", f"{'a' * 24}/checkpoint"] == "leftover"
    assert Checkpoints(store, "dpo", "a" * 24).read("training") is None


def test_an_unused_output_goes_with_its_old_attempts(store, tmp_path):
    key = _make(store, "fit", {"n": 1})
    attempt = Attempt(store, "fit", key)
    attempt.write("data", b"x")
    _age(Path(store.path("fit", key, attempt.name)), 2 * 86400)
    collect(tmp_path / "runs", store.uri, delete=True)
    assert collect(tmp_path / "runs", store.uri, delete=False).entries == []


def test_a_wrong_folder_of_runs_does_not_empty_a_store_elsewhere(tmp_path):
    store = Store(str(tmp_path / "shared"))
    key = _make(store, "fit", {"n": 1})
    (tmp_path / "runs").mkdir()
    with pytest.raises(DataError, match="holds no run"):
        collect(tmp_path / "runs", store.uri, delete=True)
    _run(tmp_path / "runs", "of-another-store", [])
    with pytest.raises(DataError, match=r"holds no run of .*shared"):
        collect(tmp_path / "runs", store.uri, delete=True)
    assert store.has("fit", key)
    with pytest.raises(DataError, match="there is no folder"):
        collect(tmp_path / "run", store.uri, delete=True)
    with pytest.raises(DataError, match="there is no store"):
        collect(tmp_path / "runs", str(tmp_path / "share"), delete=False)
    assert store.find("fit", key)


def test_a_store_that_is_no_folder_is_kept_house_of_too(tmp_path):
    store = Store(f"memory://{uuid.uuid4().hex}")
    used, unused = _make(store, "fit", {"n": 1}), _make(store, "fit", {"n": 2})
    _run(tmp_path / "runs", "demo", [["fit", used]])
    inventory = collect(tmp_path / "runs", store.uri, delete=True)
    assert _states(inventory) == {("fit", used): "used", ("fit", unused): "unused"}
    assert [o.key for o in store.outputs()] == [used]


def test_the_table_says_what_can_go(store, tmp_path):
    used = _make(store, "fit", {"n": 1}, b"x" * 3_000_000)
    _make(store, "render", {"n": 2}, b"x" * 2_000_000)
    _run(tmp_path / "runs", "demo", [["fit", used]])
    text = io.StringIO()
    show_store(collect(tmp_path / "runs", store.uri, delete=False), Console(file=text, width=150), deleted=False)
    assert "1 entry, 2.0 MB, can go: `kka gc " in text.getvalue()
    assert "1 (3.0 MB)" in text.getvalue()


def test_the_command_that_deletes_is_said_whole(tmp_path):
    runs = tmp_path / "my runs"
    store = Store(str(tmp_path / "shared"))
    _make(store, "fit", {"n": 1})
    _run(runs, "demo", [])
    text = io.StringIO()
    show_store(collect(runs, store.uri, delete=False), Console(file=text, width=40), deleted=False)
    assert f"`kka gc --output '{runs}' --store {store.uri} --delete`" in text.getvalue()
