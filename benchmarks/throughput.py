"""How fast the parts are, as ratios measured in one run: `python -m benchmarks.throughput [ROW ...]`.

Each row is a function whose figures are put at the top level of `benchmarks/results/throughput.json`; rows that are not
named keep what they measured before. Ratios are of the same work done two ways, one after the other, in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import captions, pools, preference
from kka_ray.files import write_json

RESULT = Path(__file__).parent / "results" / "throughput.json"
ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    "pool_overhead": pools.pool_overhead,
    "overlap": pools.overlap,
    "scaling": pools.scaling,
    "orchestration_share": pools.orchestration_share,
    "captions_over_reference": captions.captions_over_reference,
    "captions_over_generate_float32": captions.captions_over_generate_float32,
    "captions_over_generate_bf16": captions.captions_over_generate_bf16,
    "vllm_over_transformers": captions.vllm_over_transformers,
    "dpo_over_trl": preference.dpo_over_trl,
}
ELSEWHERE = ("vllm_over_transformers",)
"""Rows that want the environment of `make setup-vllm`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="by default all but those that want vLLM")
    parser.add_argument("--target", type=Path, default=RESULT)
    arguments = parser.parse_args()
    console = Console()
    for name in arguments.rows or [row for row in ROWS if row not in ELSEWHERE]:
        console.print(f"{name} ...", highlight=False)
        measured = ROWS[name]()
        console.print(json.dumps(measured, indent=1), highlight=False)
        # Written after each row: a later one may be interrupted.
        there = json.loads(arguments.target.read_text()) if arguments.target.is_file() else {}
        machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
        write_json(arguments.target, {**there, **measured, "machine": machine})


if __name__ == "__main__":
    main()
