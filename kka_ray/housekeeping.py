"""What the store holds, which runs refer to it, and what can go."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from kka_ray import places
from kka_ray.amounts import amount
from kka_ray.errors import DataError
from kka_ray.store import Output, Store

LEFTOVER_AGE = timedelta(days=1)
"""An attempt that wrote nothing for so long is not being made any more."""

State = Literal["used", "held", "unused", "leftover", "growing"]

_OF_RUNS = ("config_hash", "sweep.yaml", "references.json")
"""What only folders of runs and sweeps hold: copies of their configurations lie among MLflow's artifacts, too."""
_KEY = re.compile(r"[0-9a-f]{24}")
_ATTEMPT = re.compile(r"\.?(attempt-[0-9a-f]+)(\.json)?|checkpoint")


@dataclass(frozen=True)
class Entry:
    """An output in the store, or what an attempt at one left behind.

    key: of the output; of an attempt `KEY/attempt-...`, of a job's checkpoints `KEY/checkpoint`.
    size: bytes.
    state: `used` (a finished run refers to it, directly or by way of other outputs), `held` (no finished run does, but
    an unfinished one might, or might go on from these checkpoints), `unused`, `leftover` (of an attempt or a job that
    never committed or was superseded, a day old or more), `growing` (of a younger one).
    runs: names of the runs that refer to it; of a held one, those that are not finished.
    """

    stage: str
    key: str
    size: int
    state: State
    runs: tuple[str, ...] = ()

    @property
    def is_output(self) -> bool:
        """Whether it was committed."""
        return "/" not in self.key

    @property
    def removable(self) -> bool:
        """Whether nothing would miss it."""
        return self.state in ("unused", "leftover")


@dataclass(frozen=True)
class Inventory:
    """What the store at `store_uri` holds, by stage and key, seen from the runs in the folder `output`."""

    entries: list[Entry]
    output: str
    store_uri: str


def collect(output: str | Path, store_uri: str, delete: bool) -> Inventory:
    """Everything in the store at `store_uri`; `delete` removes what is unused and leftovers.

    A run is a folder below `output` with `config_hash` or `references.json`, a sweep one with `sweep.yaml`. As long as
    one of them has no readable `references.json`, it was interrupted or still goes on, and no output counts as unused,
    nor do checkpoints of an output that is not there yet.
    Runs elsewhere that share the store are not seen.

    Raises DataError if there is no folder `output` or no such store; if something is to be deleted, or `output` is a
    URI, and no run in it refers to the store while that lies elsewhere, which is more likely a wrong folder than a
    store that nobody wants; and if a run began while it was being read.
    """
    store = Store(store_uri)
    with places.opened(output, *_OF_RUNS) as place:
        if not place.here.is_dir():
            raise DataError(f"there is no folder {output}; name the folder of the runs with --output")
        if place.vanished:
            raise DataError(
                f"{', '.join(place.vanished)} in {output} went while it was being read: a run there has just begun. "
                "Run the command again"
            )
        if not store.filesystem.exists(store.root):
            raise DataError(f"there is no store {store_uri}; name it with --store")
        inside = _is_inside(store, output)
        runs = _runs(place.here, store)
    entries = _outputs(store, runs) + _attempts(store, _unfinished(runs))
    if (delete or places.is_uri(output)) and not inside and not any(entry.runs for entry in entries):
        raise DataError(
            f"{output} holds no run of {store_uri}, so nothing in it would be kept. If the store is not wanted any "
            "more, delete it yourself; otherwise name the folder of the runs with --output"
        )
    if delete:
        with places.opened(output, *_OF_RUNS) as place:
            if place.vanished or _runs(place.here, store) != runs:
                raise DataError(
                    f"a run in {output} began or ended while the store was being read, and nothing was deleted. "
                    "Run the command again"
                )
        for entry in entries:
            if entry.state == "unused":
                store.remove(entry.stage, entry.key)
        for entry in entries:
            if entry.state == "leftover":
                _remove_attempt(store, entry)
    return Inventory(sorted(entries, key=lambda e: (e.stage, e.key)), str(output), store_uri)


def _is_inside(store: Store, output: str | Path) -> bool:
    if places.is_uri(output):
        return store.uri.startswith(f"{str(output).rstrip('/')}/")
    return store.is_local and Path(store.root).resolve().is_relative_to(Path(output).resolve())


def show_store(inventory: Inventory, console: Console, deleted: bool) -> None:
    """A table of the stages, and what went or could go."""
    entries = inventory.entries
    table = Table(title="store")
    table.add_column("stage")
    for name in ("outputs", "size", "used", "held", "unused", "leftovers"):
        table.add_column(name, justify="right")
    for stage in sorted({e.stage for e in entries}):
        own = [e for e in entries if e.stage == stage]
        outputs = [e for e in own if e.is_output]
        counts = [_count(own, state) for state in ("used", "held", "unused", "leftover")]
        table.add_row(stage, str(len(outputs)), megabytes(sum(e.size for e in own)), *counts)
    table.add_row("all", *_totals(entries), end_section=True)
    console.print(table)
    unfinished = sorted({run for e in entries if e.state == "held" for run in e.runs})
    if unfinished:
        console.print(
            f"{', '.join(unfinished)}: not finished, so every output is kept, and what a job goes on from. Finish with "
            "`kka resume`, a sweep with its command again, or remove the folder",
            highlight=False,
            soft_wrap=True,
        )
    removable = [e for e in entries if e.removable]
    entry, size = amount(len(removable), "entry", "entries"), megabytes(sum(e.size for e in removable))
    if deleted:
        console.print(f"deleted {entry}, {size}", highlight=False)
    elif removable:
        command = ["kka", "gc", "--output", inventory.output, "--store", inventory.store_uri, "--delete"]
        text = f"{entry}, {size}, can go: `{shlex.join(command)}`"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    else:
        console.print("nothing can go", highlight=False)


def megabytes(size: int) -> str:
    """A size in bytes as text."""
    return f"{size / 1e6:.1f} MB"


def _count(entries: Iterable[Entry], state: State) -> str:
    sizes = [e.size for e in entries if e.state == state]
    return f"{len(sizes)} ({megabytes(sum(sizes))})" if sizes else ""


def _totals(entries: Sequence[Entry]) -> list[str]:
    outputs = sum(e.is_output for e in entries)
    states: tuple[State, ...] = ("used", "held", "unused", "leftover")
    return [str(outputs), megabytes(sum(e.size for e in entries)), *(_count(entries, state) for state in states)]


def _runs(output: Path, store: Store) -> dict[str, set[tuple[str, str]] | None]:
    """Each run's name with the (stage, key) it refers to, None if it is not finished.

    A run whose folder was moved elsewhere and linked from here is one as well.
    """
    inside = Path(store.root).resolve() if store.is_local else None
    found: dict[str, set[tuple[str, str]] | None] = {}
    seen: set[Path] = set()
    for name, folders, files in os.walk(output, onerror=_unless_gone, followlinks=True):
        folder, real = Path(name), Path(name).resolve()
        if real in seen or (inside is not None and real.is_relative_to(inside)):
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        if not set(_OF_RUNS).isdisjoint(files):
            found[folder.relative_to(output).as_posix()] = _references(folder / "references.json")
    return found


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise DataError(f"cannot read {error.filename}: {error.strerror}. A run in it would not be seen") from error


def _references(file: Path) -> set[tuple[str, str]] | None:
    try:
        return {(str(stage), str(key)) for stage, key in json.loads(file.read_text())}
    except (FileNotFoundError, ValueError, TypeError):
        return None  # not written yet, or cut short: such a run may refer to anything


def _unfinished(runs: dict[str, set[tuple[str, str]] | None]) -> tuple[str, ...]:
    return tuple(run for run, named in runs.items() if named is None)


def _outputs(store: Store, runs: dict[str, set[tuple[str, str]] | None]) -> list[Entry]:
    outputs = {(o.stage, o.key): o for o in store.outputs()}
    users: dict[tuple[str, str], list[str]] = {name: [] for name in outputs}
    for run, named in runs.items():
        for name in _reachable(named or set(), outputs):
            users[name].append(run)
    unfinished = _unfinished(runs)
    entries = []
    for (stage, key), found in users.items():
        size = store.size(stage, key) - sum(s for _, s, _ in _attempt_folders(store, stage, key))
        if found:
            entries.append(Entry(stage, key, size, "used", tuple(found)))
        else:
            entries.append(Entry(stage, key, size, "held" if unfinished else "unused", unfinished))
    return entries


def _reachable(named: set[tuple[str, str]], outputs: dict[tuple[str, str], Output]) -> set[tuple[str, str]]:
    """The outputs named, and those that their markers name as inputs, and so on."""
    by_key: dict[str, list[tuple[str, str]]] = {}
    for stage, key in outputs:
        by_key.setdefault(key, []).append((stage, key))
    reached: set[tuple[str, str]] = set()
    waiting = [name for name in named if name in outputs]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            inputs = outputs[name].marker.get("inputs", {})
            waiting += [other for key in _keys(inputs) for other in by_key.get(key, ())]
    return reached


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _keys(part)
    elif isinstance(value, list):
        for part in value:
            yield from _keys(part)
    elif isinstance(value, str) and _KEY.fullmatch(value):
        yield value


def _attempts(store: Store, unfinished: tuple[str, ...]) -> list[Entry]:
    """What is in the store besides committed outputs.

    An `unfinished` run begins each attempt anew, but goes on from a job's checkpoints, however old.
    """
    entries = []
    for path in _children(store, store.root):
        stage = path.rsplit("/", 1)[-1]
        for folder in _children(store, path):
            key = folder.rsplit("/", 1)[-1]
            for name, size, newest in _attempt_folders(store, stage, key):
                old = newest is not None and datetime.now(UTC) - newest > LEFTOVER_AGE
                if old and unfinished and name == "checkpoint" and store.find(stage, key) is None:
                    entries.append(Entry(stage, f"{key}/{name}", size, "held", unfinished))
                else:
                    entries.append(Entry(stage, f"{key}/{name}", size, "leftover" if old else "growing"))
    return entries


def _attempt_folders(store: Store, stage: str, key: str) -> Iterator[tuple[str, int, datetime | None]]:
    """(name, bytes, time of the newest file) of attempts at an output, but the committed one, and of checkpoints."""
    committed = store.find(stage, key)
    keep = committed.marker["attempt"] if committed else None
    for path in _listed(store, store.path(stage, key)):
        name = path.rsplit("/", 1)[-1]
        match = _ATTEMPT.fullmatch(name)
        # A marker that was not put in its place any more has the name of its attempt, and a dot.
        if match and (match[1] is None or match[1] != keep or name.startswith(".")):
            files = store.filesystem.find(path) or [path]
            yield name, store.size(stage, key, name), _newest(store, files)


def _newest(store: Store, files: Sequence[str]) -> datetime | None:
    """When the last of the files was written; None where the storage does not say, or all of them are gone."""
    times = []
    for file in files:
        try:
            found = store.filesystem.modified(file)
        except NotImplementedError:
            return None
        except FileNotFoundError:
            continue  # its attempt was discarded meanwhile
        times.append(found if found.tzinfo else found.replace(tzinfo=UTC))
    return max(times, default=None)


def _children(store: Store, path: str) -> list[str]:
    return [p for p in sorted(_listed(store, path)) if store.filesystem.isdir(p)]


def _listed(store: Store, path: str) -> list[str]:
    """What is in a folder of the store; nothing if it is gone."""
    try:
        return [p.rstrip("/") for p in store.filesystem.ls(path, detail=False)]
    except FileNotFoundError:
        return []


def _remove_attempt(store: Store, entry: Entry) -> None:
    key, _, _ = entry.key.partition("/")
    path = store.path(entry.stage, entry.key)
    if store.filesystem.exists(path):  # not gone with an output that it was an attempt at
        store.filesystem.rm(path, recursive=True)
    folder = store.path(entry.stage, key)
    # Object stores have no empty folders; elsewhere one would be counted for ever.
    if store.filesystem.isdir(folder) and not store.filesystem.ls(folder, detail=False):
        store.filesystem.rmdir(folder)
