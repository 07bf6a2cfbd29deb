"""Jobs that are started before it is known what they are to do."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from kka_ray.cluster import train
from kka_ray.config.models import ClusterConfig
from kka_ray.errors import NotFreeError, ResourceError, StageError

pytestmark = pytest.mark.usefixtures("local_ray")

CLUSTER = ClusterConfig(train_cpus=0.5, train_threads=1, max_restarts=0)


def note(arguments: dict[str, Any]) -> None:
    if arguments["text"] == "fail":
        raise StageError("there is nothing to note")
    Path(arguments["file"]).write_text(f"{arguments['text']} {arguments['threads']}")


def test_a_job_that_was_started_ahead_does_what_it_is_told_and_no_sooner(tmp_path: Path) -> None:
    ahead = train.Ahead("note", note, 1, CLUSTER, imports=["json"])
    time.sleep(1)
    assert list(tmp_path.iterdir()) == []
    train.run("note", note, {"file": str(tmp_path / "a"), "text": "done"}, 1, CLUSTER, ahead=ahead)
    assert (tmp_path / "a").read_text() == "done 1"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are this process: a job of Ray Train's takes half a minute to start."""

    def run(name: str, function: Any, arguments: dict[str, Any], *_: Any, **__: Any) -> None:
        function({**arguments, "threads": 1})

    monkeypatch.setattr(train, "run", run)


@pytest.mark.usefixtures("here")
def test_its_error_is_told_to_whoever_waits_for_it() -> None:
    ahead = train.Ahead("note", note, 1, CLUSTER)
    with pytest.raises(StageError, match="nothing to note"):
        ahead.go({"file": "", "text": "fail"})


@pytest.mark.usefixtures("here")
def test_a_cancelled_job_ends_without_doing_anything(tmp_path: Path) -> None:
    ahead = train.Ahead("note", note, 1, CLUSTER)
    assert ahead._thread.is_alive()
    ahead.cancel()
    assert not ahead._thread.is_alive()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("told", ["after its wait", "within its wait"])
def test_one_whose_places_others_had_starts_again_when_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    started: list[Any] = []
    is_told = threading.Event()
    opened = train.Ahead._open

    def late(name: str, function: Any, arguments: dict[str, Any], *_: Any, **__: Any) -> None:
        started.append(function)
        if len(started) == 1:
            assert told == "after its wait" or is_told.wait(30)
            raise NotFreeError("its places were not free")
        function({**arguments, "threads": 1})

    def tell(ahead: train.Ahead, arguments: dict[str, Any] | None) -> None:
        opened(ahead, arguments)
        is_told.set()

    monkeypatch.setattr(train, "run", late)
    monkeypatch.setattr(train.Ahead, "_open", tell)
    ahead = train.Ahead("note", note, 1, CLUSTER)
    if told == "after its wait":
        ahead._thread.join(30)
    ahead.go({"file": str(tmp_path / "a"), "text": "done"})
    assert started == [train._behind_the_gate, note]
    assert (tmp_path / "a").read_text() == "done 1"


def test_one_that_nobody_can_tell_anything_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def direct(name: str, function: Any, arguments: dict[str, Any], *_: Any, **__: Any) -> None:
        started.append(function)
        if function is note:
            note({**arguments, "threads": 1})

    monkeypatch.setattr(train, "run", direct)
    ahead = train.Ahead("note", note, 1, CLUSTER)
    ray.kill(ahead._gate)
    ahead.go({"file": str(tmp_path / "a"), "text": "done"})
    assert started == [train._behind_the_gate, note]
    assert (tmp_path / "a").read_text() == "done 1"


def test_one_that_ran_out_of_something_else_is_not_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def full(name: str, function: Any, *_: Any, **__: Any) -> None:
        started.append(function)
        raise ResourceError("the disk is full")

    monkeypatch.setattr(train, "run", full)
    ahead = train.Ahead("note", note, 1, CLUSTER)
    with pytest.raises(ResourceError, match="the disk is full"):
        ahead.go({"file": "", "text": ""})
    assert started == [train._behind_the_gate]
