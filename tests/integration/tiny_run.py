"""A tiny run of everything, started as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from kka_ray import assets

MODELS = ("builtin:smollm2-135m-instruct", "builtin:minilm-l6-v2", "builtin:efficientnet-lite0", "builtin:flowers")
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"kind": "flowers", "normals": 60, "test_normals": 10, "test_anomalies": 10},
    "describe": {"prompts": 2, "examples": 3, "chunk": 8, "guard": {"normal_vocabulary": True}},
    "render": {"steps": 2, "chunk": 8, "normals": 8},
    # Everything that lies beyond the normals counts as hard or easy by chance here: the pairs are what matters.
    "confusion": {"upper": 8, "gap": 0, "evaluator": {"kind": "knn"}},
    "preference": {
        "steps": 1,
        "warmup": 0,
        "batch": 2,
        "micro_batch": 2,
        "min_pairs": 1,
        "rejected": ["easy", "guarded"],
    },
    "loop": {"lines": 16, "rounds": 1, "budget": 0.1},
    "detect": {
        "detectors": [{"kind": "knn"}, {"kind": "fused"}, {"kind": "deep_sad"}],
        "headline": "fused",
        "seeds": 1,
        "controls": ["noise", "drawn_normals", "normal_views"],
        "views": 2,
    },
    "cluster": {"samplers": {"cpus": 0.25}, "renderers": {"cpus": 0.25}},
}


def models_are_missing() -> bool:
    """Whether a model that the run needs is not installed."""
    return not all(assets.is_present(m) for m in MODELS)


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    options = [part for o in overrides for part in ("-o", o)]
    return kka(folder, "run", "tiny.yaml", *options)


def resume(folder: Path) -> subprocess.Popen[str]:
    """Goes on with the run from its folder."""
    return kka(folder, "resume", "runs/tiny")


def kka(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts a verb in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "kka_ray.cli", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def markers(folder: Path) -> dict[Path, int]:
    """Every output of the run's store, and when it was committed."""
    return {p: p.stat().st_mtime_ns for p in (folder / "runs" / "store").glob("*/*/committed.json")}


_TIMES = ("wall_seconds", "seconds", "fit_seconds")


def summary(folder: Path) -> Any:
    """The summary of a finished run, times left out."""
    return _without_times(json.loads((folder / "runs" / "tiny" / "summary.json").read_text()))


def records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every table of a finished run, row by row, times left out."""
    tables = sorted((folder / "runs" / "tiny" / "records").glob("*.parquet"))
    return {file.stem: _without_times(pq.read_table(file).to_pylist()) for file in tables}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in _TIMES}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def finish(process: subprocess.Popen[str], timeout: float = 600) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output
