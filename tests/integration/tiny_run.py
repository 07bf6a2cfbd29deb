"""A tiny run of everything, started as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

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
        "detectors": [{"kind": "knn"}, {"kind": "fused"}],
        "headline": "fused",
        "seeds": 1,
        "controls": ["noise", "drawn_normals"],
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
    return subprocess.Popen(
        [sys.executable, "-m", "kka_ray.cli", "run", "tiny.yaml", *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output
