import json

import numpy as np
import pytest

from kka_ray.config.models import BackboneConfig, Knn, SimpleNet
from kka_ray.detectors.tuned import Calibration, TunedDetector
from kka_ray.errors import AssetError, DataError
from kka_ray.features.backbone import Backbone
from kka_ray.features.base import Features
from kka_ray.features.robust import Robust


def _images(count: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 40, 48, 3), dtype=np.uint8))


def _fit(config, backbone: Backbone, seeds: tuple[int, int] = (0, 1)) -> TunedDetector:
    features = [backbone.extract(_images(20, seed), patches=True) for seed in seeds]
    return TunedDetector.fit(config, backbone, features[0], None, features[1], seed=0, false_positive_rate=0.1)


def test_the_threshold_flags_no_more_than_the_wanted_share_of_validation_normals():
    scores = np.random.default_rng(0).gamma(2, size=400).astype(np.float32)
    judged = Calibration.of(scores, 0.05).judge(scores)
    assert judged.anomalous.sum() == 19
    assert judged.anomalous.dtype == bool


@pytest.mark.parametrize(
    ("count", "wanted", "rate"),
    [(19, 0.05, 0.05), (20, 0.05, 0.05), (40, 0.05, 0.05), (99, 0.05, 0.05), (30, 0.3, 0.3), (2, 0.05, 1 / 3)],
)
def test_new_normals_are_flagged_at_the_wanted_rate_where_so_few_can_hold_it(count, wanted, rate):
    rng, flagged, repeats = np.random.default_rng(0), 0, 5000
    for _ in range(repeats):
        scores = rng.gamma(2, size=count + 1).astype(np.float32)
        flagged += Calibration.of(scores[1:], wanted).judge(scores[:1]).anomalous.sum()
    spread = 3 * (rate * (1 - rate) / repeats) ** 0.5
    assert rate - 1 / (count + 1) - spread < flagged / repeats < rate + spread


@pytest.mark.parametrize(("wanted", "threshold"), [(0.999, 1.0), (0.001, 3.0)])
def test_rates_that_no_score_has_take_the_nearest(wanted, threshold):
    assert Calibration.of(np.array([2, 3, 1], np.float32), wanted).threshold == threshold


def test_robust_z_and_percentile_are_on_the_scale_of_normals():
    scores = np.arange(101, dtype=np.float32)
    judged = Calibration.of(scores, 0.05).judge(np.array([50, 75, 25, 1e6, -5], np.float32))
    np.testing.assert_allclose(judged.robust_z[:3], [0, 1, -1])
    np.testing.assert_allclose(judged.percentile, [50, 75, 25, 100, 0], atol=1e-3)
    assert judged.robust_z[3] > 1000  # where the percentile is of no more use


def test_a_detector_is_calibrated_on_the_normals_that_it_was_not_fitted_to(backbone):
    judged = _fit(Knn(kind="knn"), backbone).score_images(_images(20, 1))
    assert judged.anomalous.sum() == 1  # the 19th of 20 is the threshold
    assert np.median(judged.robust_z) == pytest.approx(0, abs=1e-3)
    assert np.median(judged.percentile) == pytest.approx(50, abs=1)


def test_equal_scores_standardise_to_finite_values():
    standard = Robust.of(np.full(5, 3.0))
    assert np.array_equal(standard(np.full(2, 3.0)), [0, 0])
    assert np.isfinite(standard(np.array([4.0]))).all()


def test_heatmaps_have_the_size_of_the_images(backbone):
    heat = _fit(SimpleNet(epochs=1), backbone).heatmap_images(_images(3, 2))
    assert heat is not None
    assert heat.shape == (3, 40, 48)
    assert heat.dtype == np.float32
    assert np.isfinite(heat).all()


def test_a_detector_of_whole_images_has_no_heatmap(backbone):
    assert _fit(Knn(kind="knn"), backbone).heatmap_images(_images(2, 2)) is None


def test_heatmaps_of_mixed_sizes_are_refused(backbone):
    tuned = _fit(SimpleNet(epochs=1), backbone)
    with pytest.raises(DataError, match="different sizes"):
        tuned.heatmap_images([*_images(1, 2), np.zeros((8, 8, 3), np.uint8)])


def test_scoring_images_is_scoring_their_features(backbone):
    tuned = _fit(Knn(kind="knn"), backbone)
    images = _images(4, 3)
    features: Features = backbone.extract(images, patches=False)
    np.testing.assert_array_equal(tuned.score_images(images).score, tuned.score(features).score)
    assert len(tuned.score_images(images)) == 4


def test_another_backbone_is_refused(backbone, tmp_path, save_resnet):
    _fit(Knn(kind="knn"), backbone).save(tmp_path)
    other = Backbone.load(BackboneConfig(model=save_resnet(1), image_size=64))
    with pytest.raises(AssetError, match="fit the detector again"):
        TunedDetector.load(tmp_path, other)


def test_another_image_size_is_refused(backbone, tmp_path):
    _fit(Knn(kind="knn"), backbone).save(tmp_path)
    other = Backbone.load(BackboneConfig(model=backbone.config.model, image_size=96))
    with pytest.raises(AssetError, match="image_size = 64"):
        TunedDetector.load(tmp_path, other)


def test_a_backbone_of_another_batch_size_is_welcome(backbone, tmp_path):
    _fit(Knn(kind="knn"), backbone).save(tmp_path)
    other = Backbone.load(BackboneConfig(model=backbone.config.model, image_size=64, batch=2))
    assert TunedDetector.load(tmp_path, other).backbone is other


def test_scores_that_are_equal_are_not_less() -> None:
    same = Calibration.of(np.ones(10), 0.05).judge(np.array([0.5, 1.0, 1.5]))
    assert same.percentile.tolist() == [0, 0, 100]
    assert same.anomalous.tolist() == [False, False, True]
    halves = Calibration.of(np.repeat([1.0, 2.0], 50), 0.05).judge(np.array([1.0, 1.5, 2.0, 3.0]))
    assert halves.percentile[0] == 0
    assert halves.percentile[2] == pytest.approx(50, abs=1)
    assert halves.percentile[3] == 100


def test_tensors_of_another_detector_are_refused(backbone, tmp_path):
    for name, seeds in (("here", (0, 1)), ("other", (2, 3))):
        _fit(Knn(kind="knn"), backbone, seeds).save(tmp_path / name)
    (tmp_path / "other" / "detector.safetensors").rename(tmp_path / "here" / "detector.safetensors")
    with pytest.raises(AssetError, match=r"no readable detector: detector\.safetensors is not the file"):
        TunedDetector.load(tmp_path / "here", backbone)


def test_a_save_that_is_interrupted_leaves_the_detector_that_was_there(backbone, tmp_path, monkeypatch):
    before, images = _fit(Knn(kind="knn"), backbone), _images(3, 2)
    before.save(tmp_path)

    def interrupted(tensors, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("kka_ray.detectors.tuned.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _fit(Knn(kind="knn"), backbone, (2, 3)).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["detector.json", "detector.safetensors"]
    now = TunedDetector.load(tmp_path, backbone)
    np.testing.assert_array_equal(now.score_images(images).score, before.score_images(images).score)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: [values], "detector.json"),
        (lambda values: 3, "detector.json"),
        (lambda values: {**values, "format": 99}, "format 99"),
        (lambda values: {k: v for k, v in values.items() if k != "state"}, "state"),
        (lambda values: {k: v for k, v in values.items() if k != "backbone_identity"}, "backbone_identity"),
        (lambda values: {**values, "calibration": {}}, "calibration.threshold"),
        (lambda values: {**values, "calibration": [1]}, "calibration"),
    ],
)
def test_json_of_another_kind_is_refused(backbone, tmp_path, change, said):
    _fit(Knn(kind="knn"), backbone).save(tmp_path)
    file = tmp_path / "detector.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(AssetError, match=said):
        TunedDetector.load(tmp_path, backbone)


def test_what_is_no_text_is_refused(backbone, tmp_path):
    _fit(Knn(kind="knn"), backbone).save(tmp_path)
    (tmp_path / "detector.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(AssetError, match="no readable detector"):
        TunedDetector.load(tmp_path, backbone)
