"""How far a text decides whether its image is hard: `python benchmarks/redraw.py --run runs/demo`.

Each line that a finished run drew in its zero-th round is drawn several times with other seeds, and one auditor judges
all images. The share of the variance of log-hardness that lies between texts, and how often an image is hard where
another of the same text was hard, normal-like or easy, say what preference training can learn from single images. Needs
the run's data; what the run made is read from its folder. Writes `benchmarks/results/redraw.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from kka_ray.config import load
from kka_ray.config.models import RunConfig
from kka_ray.confusion import judge
from kka_ray.data.decode import decode
from kka_ray.experiment import absolute, computing
from kka_ray.files import write_json
from kka_ray.prepare import prepare
from kka_ray.render.renderer import Renderer
from kka_ray.store import Store

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "redraw.json"
_SEED = 77_000_000
"""Of the first image; those of a run are far from it."""


def figures(hardness: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What the draws say: hardness and labels are (draws, texts), at least two draws."""
    draws = len(hardness)
    logs = np.log1p(hardness.clip(0))
    within = float(logs.var(0, ddof=1).mean())
    between = max(float(logs.mean(0).var(ddof=1)) - within / draws, 0.0)
    hard = labels == "hard"
    others = (hard.sum(0) - hard) / (draws - 1)  # share of the text's other images that are hard
    chances = {
        f"hard_elsewhere_if_{label}": float(others[labels == label].mean()) if (labels == label).any() else None
        for label in ("hard", "normal_like", "between", "easy")
    }
    pairs = list(combinations(range(draws), 2))
    return {
        "texts": hardness.shape[1],
        "draws": draws,
        "rank_correlation": float(np.mean([spearmanr(hardness[i], hardness[j])[0] for i, j in pairs])),
        "variance_between_texts": between / (between + within),
        "hard": float(hard.mean()),
        **chances,
    }


def measure(run: Path, draws: int) -> dict[str, Any]:
    """Draws and judges the lines of a run's zero-th round."""
    config = absolute(load(run / "config.yaml", RunConfig))
    lines = pd.read_parquet(run / "records" / "descriptions.parquet")
    texts = list(lines[(lines["round"] == 0) & (lines["status"] == "ok")]["text"])
    renderer = Renderer.load(config.render)
    seeds = range(_SEED, _SEED + draws * len(texts))
    images = renderer.draw(texts * draws, list(seeds))
    there = [image for image in images if isinstance(image, np.ndarray)]
    if len(there) < len(images):
        raise RuntimeError(f"{len(images) - len(there)} of {len(images)} images could not be drawn")
    with computing(config.cluster.driver_threads):
        prepared = prepare(config, Store(config.store.uri))

        def rows_of(images: Sequence[np.ndarray]) -> np.ndarray:
            return judge.rows(config.confusion, prepared.backbone.extract(list(images), patches=False))

        rows = judge.rows(config.confusion, prepared.train), judge.rows(config.confusion, prepared.validation)
        if config.confusion.drawn_normals:
            captions = pd.read_parquet(run / "records" / "drawn_normals.parquet")
            own = [decode(picture, "a drawn normal") for picture in captions[captions["status"] == "ok"]["image"]]
            rows = judge.with_drawn_normals(*rows, rows_of(own))
        drawn = rows_of(there)
        confusion = config.confusion.model_copy(update={"rule": "band"})
        ids = [f"r0-{i:06d}" for i in range(len(there))]
        found = judge.judge(ids, [0] * len(ids), drawn, texts * draws, *rows, confusion, config.seed)
    by_id = {verdict.id: verdict for verdict in found.verdicts}
    hardness = np.array([by_id[id_].hardness for id_ in ids]).reshape(draws, -1)
    labels = np.array([by_id[id_].label for id_ in ids]).reshape(draws, -1)
    return {"config": config.name, "renderer": config.render.pipeline, **figures(hardness, labels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run that draws from texts alone")
    parser.add_argument("--draws", type=int, default=4, help="images a text, at least 2")
    parser.add_argument("--target", type=Path, default=RESULT)
    arguments = parser.parse_args()
    write_json(arguments.target, measure(arguments.run, arguments.draws))


if __name__ == "__main__":
    main()
