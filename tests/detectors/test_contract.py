"""One contract, every detector."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from sklearn.metrics import roc_auc_score

from kka_ray.config.models import IGNORE_ANOMALIES, AeSvdd, Detector
from kka_ray.detectors import DETECTORS, build
from kka_ray.detectors.tuned import TunedDetector
from kka_ray.errors import AssetError, DataError
from kka_ray.features.backbone import Backbone
from kka_ray.features.base import Features
from kka_ray.scoring import judge

KINDS = tuple(DETECTORS)
SMALL = {
    "simplenet": {"epochs": 3},
    "simplenet_pixels": {"maps": 4, "epochs": 3, "encoder_epochs": 3},
    "mlp_head": {"hidden": 32, "batch": 32, "epochs": 10, "learning_rate": 1e-2},
    "energy_head": {"hidden": 32, "batch": 32, "epochs": 10, "learning_rate": 1e-2},
    "beatgan": {"maps": 4, "width": 8, "batch": 16, "epochs": 2, "learning_rate": 3e-3},
    "genias": {"maps": 4, "width": 8, "batch": 16, "generator_epochs": 3, "epochs": 3, "learning_rate": 3e-3},
    "deep_svdd": {"hidden": 64, "width": 32},
    "deep_sad": {"hidden": 64, "width": 32},
    "ae_svdd": {"hidden": 64, "width": 32},
}
"""What the few small features here need of the options; the defaults are for sets of hundreds."""
NEED_VARIANCE = ("mahalanobis", "padim", "deep_svdd", "deep_sad", "ae_svdd")


def _config(kind: str):
    return TypeAdapter(Detector).validate_python({"kind": kind, **SMALL.get(kind, {})})


def _features(count: int, seed: int, shift: float = 0.0) -> Features:
    """Unit vectors around one direction; `shift` moves them, and a corner of their patches and pixels, away from it."""
    rng = np.random.default_rng(seed)
    pooled = 0.1 * rng.standard_normal((count, 24)) + np.eye(24)[0] + shift * np.eye(24)[1]
    patches = rng.standard_normal((count, 4, 4, 10))
    patches[:, :2, :2] += 6 * shift
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    pixels = 120 + 10 * rng.standard_normal((count, 32, 32, 3))
    pixels[:, :16, :16] += 10 * rng.standard_normal((count, 1, 1, 3)) + 60 * shift
    return Features(
        unit.astype(np.float32), patches.astype(np.float16), pixels=pixels.clip(0, 255).round().astype(np.uint8)
    )


NORMALS, VALIDATION, ANOMALIES = _features(120, 0), _features(40, 1), _features(20, 2, 1.0)
TEST_NORMALS, TEST_ANOMALIES = _features(60, 3), _features(60, 4, 1.0)
TEST = Features.join([TEST_NORMALS, TEST_ANOMALIES])


def _fitted(kind: str, anomalies: Features | None = ANOMALIES, seed: int = 0):
    detector = build(_config(kind))
    detector.fit(NORMALS, anomalies, VALIDATION, seed)
    return detector


def _assert_close(a: np.ndarray, b: np.ndarray) -> None:
    """Equal to 1e-5 of the spread of the scores."""
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_anomalies_score_higher(kind):
    scores = _fitted(kind).score(TEST)
    assert scores.dtype == np.float32
    assert scores.shape == (120,)
    assert roc_auc_score(np.repeat([0, 1], 60), scores) > 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anomalies", [None, ANOMALIES.take([])])
def test_without_anomalies_it_fits_or_says_that_it_needs_them(kind, anomalies):
    if build(_config(kind)).needs_anomalies:
        with pytest.raises(ValueError, match="learns from anomalies"):
            _fitted(kind, anomalies)
    else:
        scores = _fitted(kind, anomalies).score(TEST)
        assert roc_auc_score(np.repeat([0, 1], 60), scores) > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_repeats_and_leaves_the_global_random_state_alone(kind):
    torch.manual_seed(5)
    np.random.seed(5)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = _fitted(kind).score(TEST)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)
    torch.manual_seed(6)
    assert np.array_equal(_fitted(kind).score(TEST), first)


@pytest.mark.parametrize(
    "kind", ["simplenet", "patchcore", "mlp_head", "energy_head", "deep_svdd", "deep_sad", "ae_svdd"]
)
def test_the_seed_matters_to_what_is_random(kind):
    assert not np.array_equal(_fitted(kind, seed=1).score(TEST), _fitted(kind, seed=2).score(TEST))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in IGNORE_ANOMALIES])
def test_what_weighs_more_among_anomalies_scores_more(kind):
    """Two sorts of anomalies, on two sides: each scores the more beside the other, the more it weighs."""
    sorts = [_features(20, 5, 0.3), _features(20, 6, -0.3)]
    margins = []
    for weights in ((50, 1), (1, 1), (1, 50)):
        detector = build(_config(kind))
        both = replace(Features.join(sorts), weights=np.repeat(weights, 20).astype(np.float32))
        detector.fit(NORMALS, both, VALIDATION, 0)
        margins.append(np.median(detector.score(sorts[0])) - np.median(detector.score(sorts[1])))
    assert margins[0] > margins[1] > margins[2]


def _seen(features: Features) -> Features:
    """Views that differ from their images by a step along an axis of its own."""
    pooled = features.pooled + 0.3 * np.eye(24, dtype=np.float32)[2]
    return replace(features, pooled=pooled / np.linalg.norm(pooled, axis=1, keepdims=True))


def _apart(kind: str, normals: Features, anomalies: Features | None) -> float:
    """AUC of views of unseen normals against these, for a detector fitted to `normals` and `anomalies`."""
    config = _config(kind)
    if kind == "simplenet":  # so few normals are learned from slowly
        config = config.model_copy(update={"epochs": 10, "learning_rate": 1e-2})
    detector = build(config)
    detector.fit(normals, anomalies, VALIDATION, 0)
    scores = detector.score(Features.join([TEST_NORMALS, _seen(TEST_NORMALS)]))
    return float(roc_auc_score(np.repeat([0, 1], 60), scores))


@pytest.mark.parametrize("kind", ["simplenet", "head", "mlp_head", "energy_head", "deep_sad"])
def test_what_views_of_normals_show_as_well_is_no_anomaly(kind):
    """Views of anomalies alone would teach what a view is."""
    anomalies = replace(ANOMALIES, views=_seen(_features(60, 7, 1.0)))
    viewed = replace(NORMALS, views=_seen(_features(60, 8)))
    assert _apart(kind, viewed, anomalies) < _apart(kind, NORMALS, anomalies) - 0.05


@pytest.mark.parametrize("kind", ["simplenet", "deep_sad"])
def test_views_of_normals_are_learnt_without_anomalies_too(kind):
    """So what a detector gets beside anomalies can be told from what these bring."""
    viewed = replace(NORMALS, views=_seen(_features(60, 8)))
    assert _apart(kind, viewed, None) < _apart(kind, NORMALS, None) - 0.05


def test_the_configuration_knows_which_detectors_ignore_anomalies():
    assert {kind for kind in KINDS if build(_config(kind)).ignores_anomalies} == set(IGNORE_ANOMALIES)


@pytest.mark.parametrize("kind", IGNORE_ANOMALIES)
def test_one_class_detectors_ignore_anomalies(kind):
    assert np.array_equal(_fitted(kind).score(TEST), _fitted(kind, None).score(TEST))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_batch(kind):
    detector = _fitted(kind)
    parts = [detector.score(TEST.take(rows)) for rows in np.split(np.arange(120), [1, 2, 50])]
    _assert_close(np.concatenate(parts), detector.score(TEST))


@pytest.mark.parametrize("kind", ["knn", "fused", "mlp_head", "energy_head", "patchcore"])
def test_the_normals_are_not_converted_at_every_call(kind, monkeypatch):
    detector = _fitted(kind)
    restored = build(_config(kind)).restore(*detector.state())
    converted = []
    double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda x: (converted.append(len(x)), double(x))[1])
    for one in (detector, restored):
        one.score(TEST.take(range(50)))
    assert set(converted) == {50}


@pytest.mark.parametrize("kind", KINDS)
def test_restoring_the_state_gives_the_same_scores(kind):
    detector = _fitted(kind)
    tensors, values = detector.state()
    assert np.array_equal(build(_config(kind)).restore(tensors, values).score(TEST), detector.score(TEST))


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_does_not_change_its_inputs(kind):
    before = [x.copy() for f in (NORMALS, ANOMALIES, VALIDATION) for x in (f.pooled, f.patches, f.pixels)]
    _fitted(kind).score(TEST)
    after = [x for f in (NORMALS, ANOMALIES, VALIDATION) for x in (f.pooled, f.patches, f.pixels)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_heatmaps_show_where_or_there_are_none(kind):
    backbone: Any = None  # features are given
    tuned = TunedDetector.fit(_config(kind), backbone, NORMALS, ANOMALIES, VALIDATION, 0, 0.1)
    heat = tuned.heatmap(TEST_ANOMALIES)
    side = {"simplenet_pixels": 8, "beatgan": 32, "genias": 32}.get(kind, 4 if tuned.detector.needs_patches else None)
    if side is None:
        assert heat is None
        return
    assert heat.shape == (60, side, side)
    assert heat.dtype == np.float32
    half = side // 2
    assert heat[:, :half, :half].mean() > heat[:, half:, half:].mean() + 1


@pytest.mark.parametrize("kind", KINDS)
def test_one_normal_gives_finite_scores_or_a_clear_error(kind):
    detector = build(_config(kind))
    one = NORMALS.take([0])
    if kind in NEED_VARIANCE:
        with pytest.raises(DataError, match="no variance"):
            detector.fit(one, ANOMALIES, one, 0)
        return
    detector.fit(one, ANOMALIES, one, 0)
    assert np.isfinite(detector.score(TEST)).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if build(_config(kind)).needs_patches])
def test_it_says_that_it_needs_patches(kind):
    with pytest.raises(ValueError, match="patches=True"):
        build(_config(kind)).fit(Features(NORMALS.pooled), None, VALIDATION, 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if build(_config(kind)).needs_pixels])
def test_it_says_that_it_needs_pixels(kind):
    with pytest.raises(ValueError, match="pixels=True"):
        build(_config(kind)).fit(Features(NORMALS.pooled), None, VALIDATION, 0)


# --- with images ----------------------------------------------------------------------------------------------------


def _images(count: int, seed: int, shape: tuple[int, ...] = (32, 32, 3)) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8))


READ_PIXELS_ONLY = {"simplenet_pixels", "beatgan", "genias"}


@pytest.mark.parametrize("config", [*map(_config, KINDS), AeSvdd(kind="ae_svdd", input="pixels", epochs=1)])
def test_the_backbone_is_run_only_for_detectors_that_read_its_features(config, backbone, monkeypatch):
    normals, validation, anomalies = (backbone.extract(_images(n, n), patches=True) for n in (24, 20, 6))
    tuned = TunedDetector.fit(config, backbone, normals, anomalies, validation, 0, 0.1)
    images = _images(5, 2, (40, 56, 3))
    whole = tuned.score(backbone.extract(images, patches=True)).score
    runs, forward = [], Backbone.forward

    def counted(self, x, patches):
        runs.append(len(x))
        return forward(self, x, patches)

    monkeypatch.setattr(Backbone, "forward", counted)
    assert np.array_equal(tuned.score_images(images).score, whole)
    assert bool(runs) == (config.kind not in READ_PIXELS_ONLY and getattr(config, "input", "features") == "features")
    with pytest.raises(DataError, match="no images"):
        tuned.score_images([])


def _tune(kind: str, backbone: Backbone, normals: list[np.ndarray], validation: list[np.ndarray]) -> TunedDetector:
    anomalies = [255 - image // 4 for image in _images(6, 9)]
    features = [backbone.extract(images, patches=True) for images in (normals, anomalies, validation)]
    return TunedDetector.fit(_config(kind), backbone, *features, seed=0, false_positive_rate=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_scores_the_same(kind, backbone, tmp_path):
    tuned = _tune(kind, backbone, _images(24, 0), _images(20, 1))
    tuned.save(tmp_path)
    loaded = TunedDetector.load(tmp_path)
    images = _images(5, 2)
    before, after = tuned.score_images(images), loaded.score_images(images)
    for name in ("score", "robust_z", "percentile", "anomalous"):
        assert np.array_equal(getattr(before, name), getattr(after, name)), name
    assert loaded.config == tuned.config
    assert loaded.calibration == tuned.calibration
    assert not [f for f in tmp_path.iterdir() if f.suffix not in (".json", ".safetensors")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_hottest_places_of_validation_normals_are_the_unit_of_the_heat_that_is_shown(kind, backbone, tmp_path):
    validation = _images(20, 1)
    tuned = _tune(kind, backbone, _images(24, 0), validation)
    tuned.save(tmp_path)
    for detector in (tuned, TunedDetector.load(tmp_path, backbone)):
        _, heat = judge(detector, validation, heat=True)
        if detector.detector.heatmap(detector.extract(validation[:1])) is None:
            assert heat is None
            continue
        hottest = heat.max((1, 2))
        assert np.median(hottest) == pytest.approx(0, abs=0.01)
        assert np.median(np.abs(hottest)) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_grey_and_odd_images_never_give_nan(kind, backbone):
    constant = [np.full((32, 32, 3), 120, np.uint8)] * 4
    odd = [*_images(1, 0, (17, 41)), *_images(1, 1, (200, 3, 3)), *_images(1, 2, (1, 1, 1)), *constant[:1]]
    scores = _tune(kind, backbone, _images(10, 0), _images(8, 1)).score_images(odd)
    assert all(np.isfinite(x).all() for x in (scores.score, scores.robust_z, scores.percentile))
    if kind in NEED_VARIANCE:
        with pytest.raises(DataError, match="no variance"):
            _tune(kind, backbone, constant, constant)
        return
    tuned = _tune(kind, backbone, constant, constant)
    scores = tuned.score_images([*constant, *odd])
    assert all(np.isfinite(x).all() for x in (scores.score, scores.robust_z, scores.percentile))
    assert np.isfinite(tuned.calibration.threshold)


@pytest.mark.parametrize("kind", KINDS)
def test_no_normals_is_an_error(kind, backbone):
    features = backbone.extract(_images(2, 0), patches=True)
    none = features.take([])
    with pytest.raises(DataError, match="no training"):
        TunedDetector.fit(_config(kind), backbone, none, None, features, 0, 0.05)
    with pytest.raises(DataError, match="no validation"):
        TunedDetector.fit(_config(kind), backbone, features, None, none, 0, 0.05)


def test_the_damaged_and_the_missing_are_refused(backbone, tmp_path):
    with pytest.raises(AssetError, match="no readable detector"):
        TunedDetector.load(tmp_path)
    _tune("knn", backbone, _images(4, 0), _images(4, 1)).save(tmp_path)
    weights = tmp_path / "detector.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AssetError, match="no readable detector"):
        TunedDetector.load(tmp_path)
