import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kka_ray import assets, detector_benchmark
from kka_ray.data.base import ImageSet
from kka_ray.data.decode import encode_png
from kka_ray.detector_benchmark import AT_LEAST, DATA_SETS, FeatureBank, Row, by_cost, choose, frozen_detectors, measure
from kka_ray.detectors import DETECTORS, default
from kka_ray.detectors.sources import KINDS
from kka_ray.errors import ConfigError
from kka_ray.features.base import Features
from kka_ray.store import Store

ROOT = Path(__file__).parents[1]


def test_names_restrict_their_kind_only():
    data, detectors, sources = choose(["knn", "magnetic_tile", "head"])
    assert (data, detectors) == (["magnetic_tile"], ["knn", "head"])
    assert sources == ["none", *KINDS, "cifar10"]
    assert choose(())[1] == list(DETECTORS)
    with pytest.raises(ConfigError, match="--only svm: there is no such"):
        choose(["knn", "svm"])


def test_a_name_of_two_kinds_says_which_is_meant():
    everything = choose(())
    with pytest.raises(ConfigError, match="say --only detector:genias or --only source:genias"):
        choose(["genias"])
    assert choose(["detector:genias"]) == (everything[0], ["genias"], everything[2])
    assert choose(["source:genias", "data:oxford102"]) == (["oxford102"], everything[1], ["genias"])
    with pytest.raises(ConfigError, match="--only source:knn: there is no such"):
        choose(["source:knn"])


def test_frozen_detectors_have_rows_of_their_own_unless_they_are_the_default_ones():
    found = frozen_detectors(ROOT / "configs" / "detectors_32px.yaml", Path("data"))
    assert {config.kind for config in found.values()} == {"ae_svdd", "beatgan", "genias", "simplenet_pixels"}
    assert found["ae_svdd (32 px)"].input == "pixels"
    for name, config in found.items():
        assert (config == default(config.kind)) == (name == config.kind)
    assert choose(["ae_svdd (32 px)"], [*DETECTORS, *found])[1] == ["ae_svdd (32 px)"]


def test_what_is_cheap_is_measured_first_and_every_data_set_before_the_next_seed(tmp_path, monkeypatch):
    order = []

    def one_row_each(name, seed, data, folder, bank, detectors, sources, known):
        for detector in detectors:
            order.append((seed, name, detector))
            yield Row(name, detector, "none", 0, seed, 0.5, 0.5, 0.5, 1.0, 1.0, 0)

    monkeypatch.setattr(detector_benchmark, "_measure_seed", one_row_each)
    monkeypatch.setattr(detector_benchmark, "open_data", lambda config, seed: None)
    monkeypatch.setattr(detector_benchmark.Backbone, "load", lambda config: None)
    only = ["beatgan", "simplenet", "knn", "fused"]
    measure(tmp_path, 2, tmp_path / "rows.json", None, lambda text: None, only)  # type: ignore[arg-type]
    sets = ["magnetic_tile", "oxford102", "ucm_captions", "cifar100_furniture"]
    assert list(DATA_SETS) == sets
    assert order == [
        (seed, name, detector)
        for part in (["knn", "fused"], ["simplenet"], ["beatgan"])
        for seed in (0, 1)
        for name in sets
        for detector in part
    ]


def test_pixels_cost_most():
    parts = by_cost(frozen_detectors(ROOT / "configs" / "detectors_32px.yaml", Path("data")) | {"knn": default("knn")})
    assert [list(part) for part in parts] == [
        ["knn"],
        ["ae_svdd (32 px)", "beatgan", "genias", "simplenet_pixels (32 px)"],
    ]


def test_the_time_of_an_image_is_the_median_of_warmed_calls(monkeypatch):
    clock, seconds = [0.0], iter([9.0, 0.1, 0.5, 0.2])

    def score(images):
        clock[0] += next(seconds)

    monkeypatch.setattr(detector_benchmark, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert detector_benchmark._milliseconds(score, [np.zeros(0)] * 10) == pytest.approx(20)
    assert next(seconds, None) is None


class _Counting:
    """Counts the images that it sees; their feature is their mean."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, store, backbone, images, patches) -> Features:
        self.seen.append(len(images))
        return Features(np.array([[x.mean()] for x in images.images], np.float32))


def test_features_are_computed_once_and_come_in_the_order_asked_for(monkeypatch):
    counting = _Counting()
    monkeypatch.setattr(detector_benchmark, "extract", counting)
    bank = FeatureBank(None, None)  # type: ignore[arg-type]

    def images(levels) -> ImageSet:
        none = ("",) * len(levels)
        pictures = tuple(np.full((2, 2, 3), n, np.uint8) for n in levels)
        return ImageSet(tuple(map(str, levels)), pictures, none, none, np.zeros(len(levels), bool))

    for levels in ([3, 1, 2], [9, 2, 7, 3, 9], [1, 7]):
        assert bank.features(images(levels)).pooled[:, 0].tolist() == levels
    assert counting.seen == [3, 2]


@pytest.mark.skipif(not assets.is_present("builtin:efficientnet-lite0"), reason="needs EfficientNet-Lite0: `kka setup`")
def test_a_killed_run_goes_on_and_rows_are_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(detector_benchmark, "_TIMED_IMAGES", 2)
    rng = np.random.default_rng(0)

    def write(folder: str, name: str, rows: list[dict]) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / folder / name)

    def picture(level: int) -> bytes:
        return encode_png(rng.integers(level, level + 60, (16, 16, 3), dtype=np.uint8))

    tiles = [
        {
            "image": picture(0 if g < 24 else 190),
            "label": int(g >= 24),
            "class_name": "x",
            "source": f"{g}",
            "group": f"{g}",
        }
        for g in range(32)
    ]
    write("magnetic_tile", "all-0.parquet", tiles)
    frozen = tmp_path / "frozen.yaml"
    detector = "{kind: ae_svdd, input: pixels, pretrain_epochs: 1, epochs: 1}"
    frozen.write_text(f"name: x\ndata: {{kind: cifar100}}\ndetect: {{headline: ae_svdd, detectors: [{detector}]}}\n")
    write("cifar10", "train-0.parquet", [{"image": picture(100), "source": f"c{i}"} for i in range(AT_LEAST)])
    target, said = tmp_path / "out" / "detectors.json", []

    def stop_after_two(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            raise KeyboardInterrupt

    only = ["magnetic_tile", "knn", "head", "ae_svdd (32 px)", "none", "noise", "cifar10"]
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, 2, target, Store(str(tmp_path / "store")), stop_after_two, only, frozen=frozen)
    first = json.loads(target.read_text())["rows"]
    assert len(first) == 2
    again: list[str] = []
    rows = measure(tmp_path, 2, target, Store(str(tmp_path / "store")), again.append, only, frozen=frozen)
    # k-NN ignores anomalies and the head needs some.
    assert sorted((r.detector, r.source, r.count, r.seed) for r in rows) == sorted(
        (d, s, n, seed)
        for seed in (0, 1)
        for d, s, n in [
            *(("knn", "none", 0), ("head", "noise", AT_LEAST), ("head", "cifar10", AT_LEAST)),
            *(("ae_svdd (32 px)", s, AT_LEAST if s != "none" else 0) for s in ("none", "noise", "cifar10")),
        ]
    )
    assert len(again) == 10
    assert json.loads(target.read_text())["at_32px"] == {"ae_svdd": "ae_svdd (32 px)"}
    assert all(row in json.loads(target.read_text())["rows"] for row in first)
    assert all(0 <= r.auc <= 1 and r.fit_seconds > 0 and r.ms_per_image > 0 for r in rows)
