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

from benchmarks import pools
from kka_ray.files import write_json

RESULT = Path(__file__).parent / "results" / "throughput.json"
ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    "pool_overhead": pools.pool_overhead,
    "overlap": pools.overlap,
    "scaling": pools.scaling,
    "orchestration_share": pools.orchestration_share,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="by default all of them")
    parser.add_argument("--target", type=Path, default=RESULT)
    arguments = parser.parse_args()
    console = Console()
    for name in arguments.rows or ROWS:
        console.print(f"{name} ...", highlight=False)
        measured = ROWS[name]()
        console.print(json.dumps(measured, indent=1), highlight=False)
        # Written after each row: a later one may be interrupted.
        there = json.loads(arguments.target.read_text()) if arguments.target.is_file() else {}
        machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
        write_json(arguments.target, {**there, **measured, "machine": machine})


if __name__ == "__main__":
    main()
