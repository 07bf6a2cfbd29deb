"""Captioned images that a renderer learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from kka_ray.config.models import FlowersData, FolderData
from kka_ray.config.renderer import DataSource, FlowersSource, ParquetSource, RendererConfig
from kka_ray.data import flowers, open_data
from kka_ray.data.base import content_hash
from kka_ray.data.parquet import decode_rows, read_rows, shards
from kka_ray.errors import ConfigError, DataError
from kka_ray.render.attributes import measure
from kka_ray.render.captions import vary

_SHARD = 5000


class Captioned(NamedTuple):
    """Images uint8 (N, S, S, 3) and captions for each, source after source; and of each source how many `images` there
    are, and how many were left out, by reason."""

    images: np.ndarray
    captions: list[tuple[str, ...]]
    counts: list[dict[str, int]]


def read_sources(config: RendererConfig) -> Captioned:
    """What all sources of a training show. Test rows are never shown.

    Each image has `config.captions` captions, possibly equal; of a drawn one they are equal.
    """
    images: list[np.ndarray] = []
    captions: list[tuple[str, ...]] = []
    counts: list[dict[str, int]] = []
    for number, source in enumerate(config.sources):
        if isinstance(source, FlowersSource):
            pictures, texts = _draw_flowers(source, config.processes)
            images.append(np.stack([_square(p, config.network.image_size) for p in pictures]))
            captions += [(text,) * config.captions for text in texts]
            counts.append({"images": len(pictures)})
        else:
            root = Path(config.data)
            rows, photographs, left_out = (
                _normals(source, root) if isinstance(source, DataSource) else _shown(source, root)
            )
            squares = [_square(p, config.network.image_size) for p in photographs]
            images.append(np.stack(squares))
            rng = np.random.default_rng([config.training.seed, 3, number])
            captions += [
                _captions(row, image, source.style, config.captions, rng)
                for row, image in zip(rows, squares, strict=True)
            ]
            counts.append({"images": len(rows), **left_out})
    return Captioned(np.concatenate(images), captions, counts)


def check_folders(config: RendererConfig) -> None:
    """Raises DataError if the folder of a source is not there."""
    for source in config.sources:
        for root in _roots(source, Path(config.data).expanduser()):
            if not root.is_dir():
                raise DataError(
                    f"a source's folder is {root}, which is no folder; name the one it lies in as -o data=DIR"
                )


def state_of_files(config: RendererConfig) -> str:
    """SHA-256 of names, sizes and times of all files that the sources are read from: another one if any changed."""
    digest = hashlib.sha256()
    for source in config.sources:
        for root in _roots(source, Path(config.data)):
            for file in sorted(path for path in root.rglob("*") if path.is_file()):
                stat = file.stat()
                digest.update(f"{file.relative_to(root)}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
            captions = _captions_outside(source, root)
            if captions and captions.is_file():
                stat = captions.stat()
                digest.update(f"{captions}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _roots(source: FlowersSource | DataSource | ParquetSource, data: Path) -> list[Path]:
    if isinstance(source, ParquetSource):
        return [data / source.path]
    if isinstance(source, FlowersSource) or isinstance(source.data, FlowersData):
        return []
    return [data / source.data.path]


def _captions_outside(source: FlowersSource | DataSource | ParquetSource, root: Path) -> Path | None:
    """The CSV with a folder's captions, where it does not lie in that folder."""
    if not isinstance(source, DataSource) or not isinstance(source.data, FolderData) or source.data.captions is None:
        return None
    file = (root / source.data.captions).resolve()
    return None if file.is_relative_to(root.resolve()) else file


def _draw_flowers(source: FlowersSource, processes: int) -> tuple[Sequence[np.ndarray], list[str]]:
    sizes = [min(_SHARD, source.count - start) for start in range(0, source.count, _SHARD)]
    jobs = [(size, source.seed, shard) for shard, size in enumerate(sizes)]
    with get_context("spawn").Pool(processes) as pool:
        parts = pool.starmap(_draw_shard, jobs, chunksize=1)
    return [image for images, _ in parts for image in images], [text for _, texts in parts for text in texts]


def _draw_shard(count: int, seed: int, shard: int) -> tuple[np.ndarray, list[str]]:
    drawn = flowers.make_renderer_data(count, seed, shard)
    return np.stack([d.image for d in drawn]), [d.caption for d in drawn]


def _normals(source: DataSource, root: Path) -> tuple[list[dict[str, Any]], Sequence[np.ndarray], dict[str, int]]:
    """As `_shown`, the training normals of a data set; left out are those that validate, and what the set dropped."""
    data = source.data
    if not isinstance(data, FlowersData):
        data = data.model_copy(update={"path": str(root / data.path)})
    normals = open_data(data, source.seed).normals()
    shown = normals.train
    rows = [
        {"class_name": name, "superclass": None, "captions": [caption]}
        for name, caption in zip(shown.classes, shown.captions, strict=True)
    ]
    return rows, shown.images, {"validation": len(normals.validation), **normals.dropped}


def _shown(source: ParquetSource, root: Path) -> tuple[list[dict[str, Any]], Sequence[np.ndarray], dict[str, int]]:
    """The train rows that may be shown, their pictures, and how many rows an evaluation holds back, by reason:
    `held_out`, normals that it does not train on, and `copies` of what it validates and tests on."""
    rows = read_rows(shards(root / source.path, "train"), ["image", "class_name", "superclass", "captions", "source"])
    unknown = set(source.without_superclasses) - {row["superclass"] for row in rows}
    unknown |= set(source.without_classes) - {row["class_name"] for row in rows}
    if unknown:
        raise ConfigError(f"{root / source.path} has no class or superclass {', '.join(sorted(unknown))} to leave out")
    rows = [row for row in rows if row["superclass"] not in source.without_superclasses]
    rows = [row for row in rows if row["class_name"] not in source.without_classes]
    if source.held_out is None:
        return rows, decode_rows(rows, source.path), {}
    held_out = source.held_out
    data = held_out.data.model_copy(update={"path": str(root / source.path)})
    modules = [open_data(data, seed) for seed in range(held_out.seeds)]
    normals = [module.normals() for module in modules]
    classes = {name for n in normals for name in (*n.train.classes, *n.validation.classes)}
    trained_on = set.intersection(*(set(n.train.ids) for n in normals))
    ours = [row for row in rows if row["class_name"] not in classes or row["source"] in trained_on]
    # Sets hold one picture under several names, in both files too.
    withheld = {content_hash(image) for n in normals for image in n.validation.images}
    for module in modules:
        test = module.test()
        withheld |= {content_hash(image) for image in test.images} if test else set()
    pictures = decode_rows(ours, source.path)
    new = [i for i, picture in enumerate(pictures) if content_hash(picture) not in withheld]
    left_out = {"held_out": len(rows) - len(ours), "copies": len(ours) - len(new)}
    return [ours[i] for i in new], [pictures[i] for i in new], left_out


def _captions(
    row: dict[str, Any], image: np.ndarray, style: str, count: int, rng: np.random.Generator
) -> tuple[str, ...]:
    plain = lambda name: name and name.replace("_", " ")  # noqa: E731
    seen = measure(image)
    name, group = plain(row["class_name"]), plain(row["superclass"])
    return tuple(vary(name, group, row["captions"], style, seen, rng) for _ in range(count))


def _square(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
