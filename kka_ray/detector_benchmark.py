"""Every detector with every anomaly source that needs no language model, on real photographs, over several seeds."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kka_ray import versions
from kka_ray.amounts import amount
from kka_ray.config.loading import load
from kka_ray.config.models import (
    BackboneConfig,
    Cifar100Data,
    Data,
    MagneticTileData,
    Oxford102Data,
    RunConfig,
    UcmData,
)
from kka_ray.config.models import Detector as DetectorConfig
from kka_ray.data import open_data
from kka_ray.data.base import DataModule, ImageSet, content_hash
from kka_ray.detectors import DETECTORS, build, default, outside
from kka_ray.detectors.sources import KINDS, make
from kka_ray.detectors.tuned import VERSION, TunedDetector
from kka_ray.errors import ConfigError
from kka_ray.evaluation import metrics, takes
from kka_ray.features.backbone import Backbone
from kka_ray.features.base import Features
from kka_ray.files import write_json
from kka_ray.prepare import bare, extract
from kka_ray.store import Store

NONE, OUTSIDE = "none", "cifar10"
SHARE = 0.05
"""Anomalies as a share of the normals, training and validation together."""
AT_LEAST = 50
"""Anomalies where the share is less, as in the runs on small data sets."""

_FALSE_POSITIVES = 0.05
_TIMED_IMAGES, _TIMED_CALLS = 32, 3

Key = tuple[str, str, str, int, int]


@dataclass(frozen=True)
class Row:
    """One detector fitted with one source and one seed, on the test images; measures in 0..1."""

    data: str
    detector: str
    source: str
    count: int
    seed: int
    auc: float
    aupr: float
    fpr95: float
    fit_seconds: float
    """Features given."""
    ms_per_image: float
    """From pixels to the score, images in batches, backbone included; median of several calls."""
    version: int
    """Of what is fitted (`kka_ray.detectors.tuned.VERSION`)."""

    @property
    def key(self) -> Key:
        """What a row is of; a file of results has one row for each."""
        return self.data, self.detector, self.source, self.count, self.seed


def _furniture(folder: Path, seed: int) -> tuple[Data, int]:
    return Cifar100Data(kind="cifar100", path=str(folder / "cifar100")), seed


def _poppies(folder: Path, seed: int) -> tuple[Data, int]:
    # Five seeds are the five folds of one cut.
    return Oxford102Data(kind="oxford102", path=str(folder / "oxford102"), fold=seed % 5), seed // 5


def _aerial(folder: Path, seed: int) -> tuple[Data, int]:
    return UcmData(kind="ucm_captions", path=str(folder / "ucm_captions")), seed


def _tiles(folder: Path, seed: int) -> tuple[Data, int]:
    return MagneticTileData(kind="magnetic_tile", path=str(folder / "magnetic_tile")), seed


DATA_SETS: dict[str, Callable[[Path, int], tuple[Data, int]]] = {
    "magnetic_tile": _tiles,
    "oxford102": _poppies,
    "ucm_captions": _aerial,
    "cifar100_furniture": _furniture,
}
"""From a name to the configuration and the seed of a data module, given the folder of all sets and a seed; the
costliest set comes last."""


def measure(
    folder: Path,
    seeds: int,
    target: Path,
    store: Store,
    say: Callable[[str], None],
    only: Sequence[str] = (),
    again: bool = False,
    frozen: Path | None = None,
) -> list[Row]:
    """Measures what is missing in `target`, which is written after every row; returns all rows.

    folder: holds `cifar100`, `cifar10`, `oxford102`, `ucm_captions` and `magnetic_tile` in Parquet. only: names of data
    sets, detectors or sources (see `choose`); each of the three kinds that is named is restricted to its names. again:
    rows that are there are measured anew. frozen: a run's configuration whose detectors are measured beside the default
    ones (see `frozen_detectors`). Raises ConfigError for a name that is unknown or of two kinds and for a configuration
    that cannot be read, DataError if data is missing or damaged.
    """
    at_32px = {} if frozen is None else frozen_detectors(frozen, folder)
    known_detectors = {kind: default(kind) for kind in DETECTORS} | at_32px
    data_sets, detectors, sources = choose(only, tuple(known_detectors))
    configs = {name: known_detectors[name] for name in detectors}
    names: dict[str, str] = {config.kind: name for name, config in at_32px.items()}
    rows = {row.key: row for row in _read(target)}
    bank = FeatureBank(store, Backbone.load(BackboneConfig()))
    # What takes long comes last, and every data set before the next seed: a benchmark that is cut short covers most.
    for part, seed, name in itertools.product(by_cost(configs), range(seeds), data_sets):
        data = open_data(*DATA_SETS[name](folder, seed))
        for row in _measure_seed(name, seed, data, folder, bank, part, sources, {} if again else rows):
            rows[row.key] = row
            _write(target, rows.values(), names)
            what = f"{name} seed {seed}: {row.detector}, {row.source} ({row.count})"
            say(f"{what}: AUC {row.auc:.4f}, {row.fit_seconds:.1f} s")
    old = sum(row.version != VERSION for row in rows.values())
    if old:
        say(f"measured by another version of the detectors: {amount(old, 'row')}; --again measures anew")
    return list(rows.values())


def by_cost(configs: Mapping[str, DetectorConfig]) -> list[dict[str, DetectorConfig]]:
    """The detectors in parts, the cheapest first: those that read one feature an image, patches, and pixels."""
    parts: dict[tuple[bool, bool], dict[str, DetectorConfig]] = {}
    for name, config in configs.items():
        made = build(config)
        parts.setdefault((made.needs_pixels, made.needs_patches), {})[name] = config
    return [parts[reads] for reads in sorted(parts)]


def frozen_detectors(file: Path, folder: Path) -> dict[str, DetectorConfig]:
    """The detectors of a run at 32 px, as in `configs/detectors_32px.yaml`, by the names of their rows.

    One with the default options has the row of its kind, which is measured anyway; another is `KIND (32 px)`. Raises
    ConfigError if the file cannot be read.
    """
    config = load(file, RunConfig, [f"data.path={folder / 'cifar100'}"])
    return {d.kind if d == default(d.kind) else f"{d.kind} (32 px)": d for d in config.detect.detectors}


def choose(only: Sequence[str], detectors: Sequence[str] = tuple(DETECTORS)) -> tuple[list[str], list[str], list[str]]:
    """Data sets, detectors and sources that the names in `only` leave, each NAME or KIND:NAME as in `source:genias`.

    Raises ConfigError for an unknown name, and for one that is of two kinds without saying which is meant.
    """
    kinds = {"data": list(DATA_SETS), "detector": list(detectors), "source": [NONE, *KINDS, OUTSIDE]}
    chosen: dict[str, list[str]] = {kind: [] for kind in kinds}
    for wanted in only:
        found = [kind for kind, names in kinds.items() if wanted.removeprefix(f"{kind}:") in names]
        if not found:
            known = "; ".join(", ".join(names) for names in kinds.values())
            raise ConfigError(f"--only {wanted}: there is no such data set, detector or source; there are {known}")
        if len(found) > 1:
            each = " or ".join(f"--only {kind}:{wanted}" for kind in found)
            raise ConfigError(f"--only {wanted}: there is a {' and a '.join(found)} of this name; say {each}")
        chosen[found[0]].append(wanted.removeprefix(f"{found[0]}:"))
    first, second, third = ([n for n in names if n in chosen[kind]] or names for kind, names in kinds.items())
    return first, second, third


def _measure_seed(
    name: str,
    seed: int,
    data: DataModule,
    folder: Path,
    bank: FeatureBank,
    detectors: Mapping[str, DetectorConfig],
    sources: Sequence[str],
    known: Mapping[Key, Row],
) -> Iterator[Row]:
    normals = data.normals()
    count = max(int(SHARE * (len(normals.train) + len(normals.validation))), AT_LEAST)
    wanted = [
        (detector, source, count if source != NONE else 0)
        for source in sources
        for detector, config in detectors.items()
        if takes(config, source != NONE)
    ]
    missing = [(d, s, n) for d, s, n in wanted if (name, d, s, n, seed) not in known]
    if not missing:
        return
    test = data.test()
    assert test is not None
    train, validation, tested = (bank.features(x) for x in (normals.train, normals.validation, test))
    for source in dict.fromkeys(s for _, s, _ in missing):
        images = _anomalies(source, normals.train.images, count, seed, folder)
        anomalies = bank.features(bare(images)) if images else None
        for detector in [d for d, s, _ in missing if s == source]:
            started = time.perf_counter()
            tuned = TunedDetector.fit(
                detectors[detector], bank.backbone, train, anomalies, validation, seed, _FALSE_POSITIVES
            )
            seconds = time.perf_counter() - started
            measured = metrics(tuned.score(tested).score, test.anomalous)
            each = _milliseconds(tuned.score_images, test.images[:_TIMED_IMAGES])
            yield Row(
                name,
                detector,
                source,
                len(images),
                seed,
                **measured,
                fit_seconds=round(seconds, 3),
                ms_per_image=round(each, 3),
                version=VERSION,
            )


def _milliseconds(score: Callable[[Sequence[np.ndarray]], object], images: Sequence[np.ndarray]) -> float:
    """What an image takes, as the median of several calls after one that warms up."""
    times = []
    for _ in range(1 + _TIMED_CALLS):
        started = time.perf_counter()
        score(images)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[1:]) / len(images)


def _anomalies(source: str, normals: Sequence[np.ndarray], count: int, seed: int, folder: Path) -> Sequence[np.ndarray]:
    if source == NONE:
        return []
    if source != OUTSIDE:
        return make(source, normals, count, seed)
    return outside.draw(folder / "cifar10", count, seed)


class FeatureBank:
    """Features of images, each computed once although the splits of several seeds share them."""

    def __init__(self, store: Store, backbone: Backbone) -> None:
        self.backbone = backbone
        self._store = store
        self._parts: list[Features] = []
        self._places: dict[str, tuple[int, int]] = {}

    def features(self, images: ImageSet) -> Features:
        """Features with patches, in the order of the images. What is new is computed, or read from the store."""
        hashes = [content_hash(image) for image in images.images]
        new = {h: row for row, h in enumerate(hashes) if h not in self._places}
        if new:
            part = len(self._parts)
            self._parts.append(extract(self._store, self.backbone, images.take(list(new.values())), patches=True))
            self._places |= {h: (part, row) for row, h in enumerate(new)}
        places = np.array([self._places[h] for h in hashes])
        pieces, order = [], []
        for part in np.unique(places[:, 0]):
            of_part = np.flatnonzero(places[:, 0] == part)
            pieces.append(self._parts[part].take(places[of_part, 1]))
            order.append(of_part)
        if len(pieces) == 1:
            return pieces[0]
        return Features.join(pieces).take(np.argsort(np.concatenate(order)))


def _read(target: Path) -> list[Row]:
    if not target.is_file():
        return []
    return [Row(**row) for row in json.loads(target.read_text())["rows"]]


def _write(target: Path, rows: Any, at_32px: Mapping[str, str]) -> None:
    """`at_32px`: the names of the rows of the frozen detectors, by their kind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted((asdict(row) for row in rows), key=lambda r: (r["data"], r["detector"], r["source"], r["seed"]))
    write_json(target, {"versions": versions.computing(), "at_32px": dict(at_32px), "rows": ordered})
