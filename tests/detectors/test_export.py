import numpy as np
import pytest

from kka_ray.config.models import DeepSvdd, EnergyHead, Knn, LinearHead, Mahalanobis, MlpHead, PatchCore, SimpleNet
from kka_ray.detectors import export
from kka_ray.detectors.export import export_onnx
from kka_ray.detectors.tuned import TunedDetector
from kka_ray.errors import ConfigError, ResourceError
from kka_ray.features.backbone import Backbone
from kka_ray.features.onnx import session

runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")


def _images(count: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))


def _fit(config, backbone: Backbone) -> TunedDetector:
    normals, anomalies, validation = (
        backbone.extract([image // (1 + 3 * dark) for image in _images(20, seed)], patches=True)
        for seed, dark in ((0, False), (1, True), (2, False))
    )
    return TunedDetector.fit(config, backbone, normals, anomalies, validation, seed=0, false_positive_rate=0.1)


@pytest.mark.parametrize(
    "config",
    [
        SimpleNet(epochs=1),
        Knn(kind="knn"),
        Mahalanobis(kind="mahalanobis"),
        LinearHead(kind="head"),
        LinearHead(kind="fused"),
        MlpHead(kind="mlp_head", epochs=1),
        EnergyHead(kind="energy_head", epochs=1, fused=False),
        DeepSvdd(kind="deep_svdd", epochs=1),
    ],
    ids=lambda config: config.kind,
)
def test_the_exported_model_gives_the_same_scores(config, backbone, tmp_path):
    tuned = _fit(config, backbone)
    export_onnx(tuned, tmp_path / "sub" / "detector.onnx")
    model = session((tmp_path / "sub" / "detector.onnx").read_bytes())
    images = _images(3, 3) + [image // 4 for image in _images(2, 4)]
    wanted = tuned.score_images(images).score
    given = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32)
    tolerance = 1e-4 * float(np.abs(wanted).max())
    for rows in (slice(0, 5), slice(2, 3)):
        (scores,) = model.run(None, {"images": given[rows]})
        np.testing.assert_allclose(scores, wanted[rows], rtol=1e-4, atol=tolerance)
    about = model.get_modelmeta().custom_metadata_map
    assert float(about["threshold"]) == tuned.calibration.threshold
    assert (about["detector"], about["image_size"]) == (config.kind, "64")


def test_a_detector_without_such_a_form_says_so(backbone, tmp_path):
    with pytest.raises(ConfigError, match="PatchCoreDetector cannot be exported"):
        export_onnx(_fit(PatchCore(kind="patchcore"), backbone), tmp_path / "detector.onnx")
    assert not list(tmp_path.iterdir())


def test_a_detector_that_onnx_runs_is_not_exported_with_its_features_as_constants(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(type(backbone), "engine", "onnx")
    with pytest.raises(ConfigError, match="only a detector on the engine torch"):
        export_onnx(_fit(Knn(kind="knn"), backbone), tmp_path / "detector.onnx")


def test_a_place_that_cannot_be_written_is_said_before_the_conversion(backbone, tmp_path, monkeypatch):
    tuned = _fit(Knn(kind="knn"), backbone)
    (tmp_path / "file").touch()
    monkeypatch.setattr(export, "to_onnx", lambda *_: pytest.fail("it was converted"))
    for place in (tmp_path, tmp_path / "file" / "detector.onnx", tmp_path / "file" / "sub" / "detector.onnx"):
        with pytest.raises(ResourceError, match=r"cannot write .*name another file"):
            export_onnx(tuned, place)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_nothing_of_a_model(backbone, tmp_path, monkeypatch):
    import onnx

    def fill(model, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", fill)
    with pytest.raises(ResourceError, match="No space left"):
        export_onnx(_fit(Knn(kind="knn"), backbone), tmp_path / "detector.onnx")
    assert not list(tmp_path.iterdir())


def test_a_detector_of_pixels_says_that_it_cannot_be_exported(backbone, tmp_path):
    config = DeepSvdd(kind="deep_svdd", input="pixels", pretrain_epochs=0, epochs=1)
    with pytest.raises(ConfigError, match="DeepSvddDetector cannot be exported"):
        export_onnx(_fit(config, backbone), tmp_path / "detector.onnx")


def test_the_engine_changes_scores_and_heat_by_rounding_only(backbone, tmp_path):
    tuned = _fit(SimpleNet(epochs=1), backbone)
    tuned.save(tmp_path)
    other = TunedDetector.load(tmp_path, engine="onnx")
    images = [*_images(3, 3), np.zeros((64, 64, 3), np.uint8)]
    wanted, found = tuned.score_images(images).score, other.score_images(images).score
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))
    heat, other_heat = tuned.heatmap_images(images), other.heatmap_images(images)
    np.testing.assert_allclose(other_heat, heat, rtol=1e-2, atol=1e-2 * float(np.abs(heat).max()))


def test_the_engine_is_for_the_cpu(backbone):
    with pytest.raises(ConfigError, match="not on cuda"):
        Backbone.load(backbone.config, "cuda", engine="onnx")
