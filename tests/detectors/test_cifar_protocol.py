"""The CIFAR-100 furniture protocol with real anomalies: figures measured when the detectors were written."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from kka_ray import assets
from kka_ray.config.models import (
    BackboneConfig,
    EnergyHead,
    Knn,
    LinearHead,
    Mahalanobis,
    MlpHead,
    Padim,
    PatchCore,
    SimpleNet,
)
from kka_ray.detectors import build
from kka_ray.features.backbone import Backbone
from kka_ray.features.base import Features

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("KKA_DATA" not in os.environ, reason="needs real data: set KKA_DATA to its folder"),
    pytest.mark.skipif(
        not assets.is_present("builtin:efficientnet-lite0"), reason="needs EfficientNet-Lite0: run `kka setup`"
    ),
]
SEEDS = (0, 1)


@dataclass
class Protocol:
    normals: Features
    outside: Features
    test: Features
    anomalous: np.ndarray


def _read(pattern: str) -> tuple[list[np.ndarray], list[str | None]]:
    images, groups = [], []
    for file in sorted(Path(os.environ["KKA_DATA"]).glob(pattern)):
        table = pq.read_table(file, columns=["image", "superclass"])
        images += [np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in table["image"].to_pylist()]
        groups += table["superclass"].to_pylist()
    return images, groups


@pytest.fixture(scope="module")
def protocol():
    backbone = Backbone.load(BackboneConfig())
    images, groups = _read("cifar100/train-*.parquet")
    furniture = [x for x, group in zip(images, groups, strict=True) if group == "household_furniture"]
    outside, _ = _read("cifar10/train-*.parquet")
    test, test_groups = _read("cifar100/test-*.parquet")
    assert (len(furniture), len(outside), len(test)) == (1250, 5000, 10_000)
    return Protocol(
        backbone.extract(furniture, patches=True),
        backbone.extract(outside, patches=True),
        backbone.extract(test, patches=True),
        np.array([group != "household_furniture" for group in test_groups]),
    )


def _auc(protocol: Protocol, config, anomalies: int) -> float:
    values = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        order, drawn = rng.permutation(1250), rng.permutation(len(protocol.outside))[:anomalies]
        train, validation = protocol.normals.take(order[:1000]), protocol.normals.take(order[1000:])
        detector = build(config)
        detector.fit(train, protocol.outside.take(drawn) if anomalies else None, validation, seed)
        values.append(roc_auc_score(protocol.anomalous, detector.score(protocol.test)))
    return float(np.mean(values))


@pytest.mark.parametrize(
    ("config", "anomalies", "expected", "tolerance"),
    [
        (Knn(kind="knn"), 0, 0.9446, 0.002),
        (Mahalanobis(kind="mahalanobis"), 0, 0.9497, 0.002),
        (PatchCore(kind="patchcore"), 0, 0.938, 0.01),
        (Padim(kind="padim"), 0, 0.949, 0.005),
        (LinearHead(kind="head"), 62, 0.951, 0.006),
        (LinearHead(kind="fused"), 62, 0.9663, 0.004),
        (LinearHead(kind="head"), 1000, 0.959, 0.004),
        (LinearHead(kind="fused"), 1000, 0.9696, 0.004),
        (MlpHead(kind="mlp_head", fused=False), 62, 0.955, 0.005),
        (MlpHead(kind="mlp_head"), 62, 0.965, 0.004),
        (MlpHead(kind="mlp_head", fused=False), 1000, 0.962, 0.004),
        (MlpHead(kind="mlp_head"), 1000, 0.968, 0.004),
        (EnergyHead(kind="energy_head", fused=False), 62, 0.950, 0.005),
        (EnergyHead(kind="energy_head"), 62, 0.964, 0.004),
        (EnergyHead(kind="energy_head", fused=False), 1000, 0.957, 0.004),
        (EnergyHead(kind="energy_head"), 1000, 0.967, 0.004),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_known_figures(protocol, config, anomalies, expected, tolerance):
    assert _auc(protocol, config, anomalies) == pytest.approx(expected, abs=tolerance)


def test_simplenet_is_near_knn_and_gains_from_anomalies(protocol):
    plain, helped = _auc(protocol, SimpleNet(), 0), _auc(protocol, SimpleNet(), 62)
    assert plain > _auc(protocol, Knn(kind="knn"), 0) - 0.03
    assert helped > plain + 0.01
