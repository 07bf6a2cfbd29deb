"""Captioned images that a renderer learns from."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from kka_ray.config.renderer import FlowersSource, ParquetSource, RendererConfig
from kka_ray.data import flowers
from kka_ray.data.captions import fill
from kka_ray.data.parquet import decode_rows, read_rows, shards

_SHARD = 5000
_TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "a small photo of {}", "a close-up of {}")


def read_sources(config: RendererConfig) -> tuple[np.ndarray, list[str]]:
    """Images uint8 (N, S, S, 3) and a caption each, source after source. Test rows are never read."""
    images, captions = [], []
    for source in config.sources:
        if isinstance(source, FlowersSource):
            pictures, texts = _draw_flowers(source, config.processes)
        else:
            pictures, texts = _read_parquet(source, config.training.seed)
        images.append(np.stack([_square(p, config.network.image_size) for p in pictures]))
        captions += texts
    return np.concatenate(images), captions


def _draw_flowers(source: FlowersSource, processes: int) -> tuple[Sequence[np.ndarray], list[str]]:
    sizes = [min(_SHARD, source.count - start) for start in range(0, source.count, _SHARD)]
    jobs = [(size, source.seed, shard) for shard, size in enumerate(sizes)]
    with get_context("spawn").Pool(processes) as pool:
        parts = pool.starmap(_draw_shard, jobs, chunksize=1)
    return [image for images, _ in parts for image in images], [text for _, texts in parts for text in texts]


def _draw_shard(count: int, seed: int, shard: int) -> tuple[np.ndarray, list[str]]:
    drawn = flowers.make_renderer_data(count, seed, shard)
    return np.stack([d.image for d in drawn]), [d.caption for d in drawn]


def _read_parquet(source: ParquetSource, seed: int) -> tuple[Sequence[np.ndarray], list[str]]:
    columns = ["image", "class_name", "superclass", "captions", "source"]
    rows = read_rows(shards(source.path, "train"), columns)
    rows = [row for row in rows if row["superclass"] not in source.exclude_superclasses]
    made = fill(_TEMPLATES, [row["class_name"].replace("_", " ") for row in rows], seed)
    rng = np.random.default_rng([seed, 3])
    texts = [
        row["captions"][rng.integers(len(row["captions"]))] if row["captions"] else caption
        for row, caption in zip(rows, made, strict=True)
    ]
    return decode_rows(rows, str(Path(source.path))), texts


def _square(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
