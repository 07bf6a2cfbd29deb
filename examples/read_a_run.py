"""Joins a run's tables by id; shows labels and hard lines by round: `python examples/read_a_run.py runs/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd


def joined(run: Path) -> pd.DataFrame:
    """A row a line: its text, whether it was refused or drawn, and how hard its image is (docs/run_folder.md)."""
    lines, images, verdicts = (
        pd.read_parquet(run / "records" / f"{name}.parquet") for name in ("descriptions", "renderings", "verdicts")
    )
    drawn = images[["id", "status", "image"]].rename(columns={"status": "drawn"})
    return lines.merge(drawn, on="id", how="left").merge(verdicts[["id", "hardness", "label"]], on="id", how="left")


if __name__ == "__main__":
    table = joined(Path(sys.argv[1]))
    print(table.groupby("round")["label"].value_counts().unstack(fill_value=0))
    hard = table[table["label"] == "hard"].sort_values("hardness")
    print(hard.groupby("round").head(5)[["round", "hardness", "text"]].to_string(index=False))
