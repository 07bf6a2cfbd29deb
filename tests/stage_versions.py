"""Which sources make the outputs of each stage, and what they were when its VERSION was last raised.

`python -m tests.stage_versions` records the present sources after a VERSION was raised. `--equal STAGE` records those
of a stage whose VERSION stays, since a test shows that its outputs are equal to the bit.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from kka_ray import prepare
from kka_ray.cluster import workers
from kka_ray.confusion import judge
from kka_ray.describe import drift, prompts
from kka_ray.detectors import tuned
from kka_ray.preference import dpo, pairs
from kka_ray.render import renderer

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("stage_versions.json")
STAGES: dict[str, tuple[int, tuple[str, ...]]] = {
    "flowers": (prepare.FLOWERS_VERSION, ("data/flowers.py", "data/flowers_module.py")),
    "features": (
        prepare.FEATURES_VERSION,
        ("features/backbone.py", "features/efficientnet.py", "features/pixels.py", "features/cache.py"),
    ),
    "prompts": (prompts.VERSION, ("describe/prompts.py",)),
    "sample": (
        workers.SAMPLE_VERSION,
        (
            "describe/sampler.py",
            "describe/lora.py",
            "describe/transformers_sampler.py",
            "describe/vllm_sampler.py",
            "describe/api_sampler.py",
        ),
    ),
    "drift": (drift.VERSION, ("describe/drift.py", "features/text.py")),
    "render": (
        renderer.VERSION,
        ("render/renderer.py", "render/pipeline.py", "render/transformer.py", "render/masks.py", "render/matching.py"),
    ),
    "judge": (judge.VERSION, ("confusion", "encoders", "features/robust.py")),
    "pairs": (pairs.VERSION, ("preference/pairs.py",)),
    "dpo": (dpo.VERSION, ("preference/dpo.py", "preference/trainer.py", "preference/packing.py")),
    "fit": (tuned.VERSION, ("detectors", "encoders", "features/base.py", "features/robust.py")),
}


def fingerprint(paths: tuple[str, ...]) -> str:
    """SHA-256 of what the sources do: comments, docstrings and layout do not count."""
    files = [
        file
        for path in paths
        for file in sorted((ROOT / "kka_ray" / path).rglob("*.py") if "." not in path else [ROOT / "kka_ray" / path])
    ]
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [part for part in body if not _is_text(part)] or [ast.Pass()]  # type: ignore[attr-defined]
        digest.update(file.relative_to(ROOT).as_posix().encode())
        # A dump without the fields that Python 3.12 added.
        digest.update(ast.dump(tree).replace(", type_params=[]", "").encode())
    return digest.hexdigest()


def current() -> dict[str, dict[str, Any]]:
    """VERSION and fingerprint of every stage."""
    return {stage: {"version": v, "sources": fingerprint(paths)} for stage, (v, paths) in STAGES.items()}


def unraised(recorded: dict[str, dict[str, Any]], present: dict[str, dict[str, Any]]) -> list[str]:
    """Stages whose sources changed while their VERSION did not."""
    return [s for s, now in present.items() if s in recorded and _changed(recorded[s], now)]


def _changed(then: dict[str, Any], now: dict[str, Any]) -> bool:
    return bool(then["sources"] != now["sources"] and then["version"] == now["version"])


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--equal", action="append", default=[], choices=sorted(STAGES))
    equal = set(parser.parse_args().equal)
    found = current()
    if RECORD.is_file() and (stages := set(unraised(json.loads(RECORD.read_text()), found)) - equal):
        raise SystemExit(f"raise VERSION of {', '.join(sorted(stages))} first: what they make may have changed")
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
