"""Whole runs on real photographs and with the loop's other modes: `python benchmarks/real_data.py --data DIR`.

DIR holds `cifar100`, `oxford102`, `ucm_captions` and `magnetic_tile` in Parquet. Each case that has not been measured
is run and its figures are added to `benchmarks/results/real_data.json`; what is there already stays (`--again` measures
it anew). The store is shared, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from kka_ray.benchmark import made_with
from kka_ray.config import config_hash, load
from kka_ray.config.models import RunConfig
from kka_ray.data.export import export_folder
from kka_ray.experiment import run
from kka_ray.files import write_json
from kka_ray.terminal import Reporter, show_summary

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "real_data.json"
BUILT_IN = ["loop.lines=128", "describe.prompts=8"]
"""Small enough for two cores. The built-in renderer draws 32 px; where that does not suit, the run says so."""


def cases(data: Path, work: Path) -> dict[str, tuple[str, list[str]]]:
    """Name of each case, its configuration and what is set otherwise."""
    tiles = work / "magnetic_tile"
    furniture = [f"data.path={data / 'cifar100'}", *BUILT_IN]
    folder = [f"data.path={tiles}", "data.description=a magnetic tile", r"data.group=\d+_(tile\d+)_", *BUILT_IN]
    mask = "render.mask={min_area: 0.05, max_area: 0.3}"
    return {
        "cifar100_furniture": ("cifar100_furniture", furniture),
        "oxford102": ("oxford102", [f"data.path={data / 'oxford102'}", *BUILT_IN]),
        "ucm_captions": ("ucm_captions", [f"data.path={data / 'ucm_captions'}", *BUILT_IN]),
        "folder": ("folder", folder),
        "folder, image-to-image in masks": ("folder", [*folder, "render.mode=img2img", mask]),
        "demo, add": ("demo", ["loop.mode=add"]),
        "demo, paper's rule": ("demo", ["confusion.rule=paper"]),
    }


def measure(name: str, config: str, overrides: list[str], work: Path, console: Console) -> dict[str, Any]:
    """Runs a case and returns its figures."""
    slug = "".join(c if c.isalnum() else "-" for c in name)
    paths = [f"name={slug}", f"output={work / 'runs'}", f"store.uri={work / 'runs' / 'store'}"]
    resolved = load(ROOT / "configs" / f"{config}.yaml", RunConfig, [*overrides, *paths])
    warnings: list[str] = []
    with Reporter(console) as reporter:
        finished = run(resolved, reporter.progress, warnings.append)
    show_summary(finished.folder, finished.summary, console)
    keep = ("detectors", "normals", "test", "budget", "generated_fraction", "kept", "drawn_normals", "wall_seconds")
    rounds = ("described", "rendered", "failed", "hard", "easy", "normal_like", "hard_rate", "diversity", "status")
    return {
        "config_hash": config_hash(resolved),
        "made_with": made_with(resolved.render.pipeline),
        "warnings": warnings,
        **{k: finished.summary[k] for k in keep},
        "rounds": [{k: r[k] for k in rounds} for r in finished.summary["rounds"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the Parquet sets")
    parser.add_argument("--work", type=Path, default=Path("runs/real_data"), help="where runs are kept")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--again", action="store_true", help="measure cases anew that are there already")
    arguments = parser.parse_args()
    console, work = Console(), arguments.work.resolve()
    if not (work / "magnetic_tile").is_dir():
        export_folder(arguments.data / "magnetic_tile", work / "magnetic_tile", seed=0)
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for name, (config, overrides) in cases(arguments.data.resolve(), work).items():
        if (arguments.only and name not in arguments.only) or (name in results and not arguments.again):
            continue
        console.rule(name)
        results[name] = measure(name, config, overrides, work, console)
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        write_json(RESULT, results)


if __name__ == "__main__":
    main()
