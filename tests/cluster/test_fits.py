import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kka_ray import assets, versions
from kka_ray.cluster import fits, train
from kka_ray.cluster.fits import SharedTraining, fit_worker
from kka_ray.config.models import BackboneConfig, ClusterConfig, Knn, SimpleNet
from kka_ray.detectors import build
from kka_ray.detectors.tuned import VERSION, TunedDetector
from kka_ray.errors import StageError
from kka_ray.features.backbone import Backbone
from kka_ray.features.base import Features
from kka_ray.features.cache import write_features
from kka_ray.store import Store, stage_key


def _features(count: int, seed: int, shift: float = 0.0) -> Features:
    rng = np.random.default_rng(seed)
    pooled, patches = rng.standard_normal((count, 12)) + shift, rng.standard_normal((count, 3, 3, 6)) + shift
    return Features(
        pooled.astype(np.float32), patches.astype(np.float16), pixels=np.zeros((count, 32, 32, 3), np.uint8)
    )


NORMALS, VALIDATION, ANOMALIES, TEST = (_features(70, 0), _features(30, 1), _features(9, 2, 1.0), _features(40, 3, 0.5))


def _scores(config: SimpleNet, training: SharedTraining) -> np.ndarray:
    detector = build(config)
    detector.training = training
    detector.fit(NORMALS, ANOMALIES, VALIDATION, 0)
    return detector.score(TEST)


def test_the_parts_of_all_workers_cover_a_batch_once(tmp_path):
    workers = [SharedTraining(Store(str(tmp_path)), "key", n, 3) for n in range(3)]
    for count in (0, 1, 2, 7, 64):
        assert sorted(i for w in workers for i in range(count)[w.rows(count)]) == list(range(count))


def test_a_fit_that_broke_off_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "CHECKPOINT_SECONDS", 0.0)
    store, config = Store(str(tmp_path)), SimpleNet(members=1, epochs=4, batch=16)

    class Breaking(SharedTraining):
        left = 6

        def keep(self, name, content) -> None:
            super().keep(name, content)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _scores(config, Breaking(store, "key"))
    assert sorted(p.name for p in (tmp_path / "fit" / "key" / "checkpoint").iterdir()) == [
        "image-0.safetensors",
        "patch.safetensors",
    ]
    again = Breaking(store, "key")
    again.left = 3  # two epochs are missing
    scores = _scores(config, again)
    again.clear()
    assert not (tmp_path / "fit" / "key" / "checkpoint").exists()
    assert np.array_equal(scores, _scores(config, SharedTraining(store, "other")))


def test_the_workers_share_out_the_fits_and_each_gets_what_it_names(tmp_path, monkeypatch):
    store, keys = Store(str(tmp_path)), {}
    for place, name in enumerate(("train", "validation", "anomalies", "of_normals", "of_anomalies")):
        features = replace(_features(2 + place, place), patches=None)
        keys[name] = store.get_or_make("features", 1, {"of": name}, lambda a, f=features: write_features(a, f)).key
    views = [keys["of_normals"], keys["of_anomalies"]]
    wanted = [
        {
            "detector": Knn(kind="knn"),
            "train": keys["train"],
            "anomalies": keys["anomalies"],
            "views": views if number == 0 else None,
            "weights": [1, 2, 3, 4] if number == 1 else None,
            "seed": number,
            "inputs": {"number": number},
        }
        for number in range(5)
    ]
    done = {}

    def fit(config, backbone, normals, anomalies, validation, seed, false_positive_rate, training):
        assert seed not in done
        done[seed] = (normals, anomalies, validation, false_positive_rate)
        return SimpleNamespace(save=lambda folder: (folder.mkdir(), (folder / "detector.json").write_text("{}")))

    monkeypatch.setattr(fits.TunedDetector, "fit", fit)
    monkeypatch.setattr(fits.Backbone, "load", lambda *_: SimpleNamespace(identity="b"))
    arguments = {"store": store.uri, "backbone": None, "patches": False, "validation": keys["validation"]}
    with pytest.raises(StageError, match="another version of the backbone"):
        fits.Fitter(store, {"backbone": None, "backbone_identity": "another"})
    arguments["backbone_identity"] = "b"
    arguments |= {"false_positive_rate": 0.03, "share": "fits", "fits": wanted, "threads": torch.get_num_threads()}
    shares = []
    for number in range(2):
        monkeypatch.setattr(fits, "rank", lambda n=number: (n, 2))
        before = set(done)
        fit_worker(arguments)
        shares.append(len(set(done) - before))
    assert shares == [3, 2]
    assert sorted(done) == list(range(5))
    for number, (normals, anomalies, validation, rate) in done.items():
        assert (len(normals), len(validation), len(anomalies), rate) == (2, 3, 4, 0.03)
        sizes = [len(f.views) if f.views else 0 for f in (normals, anomalies)]
        assert sizes == ([5, 6] if number == 0 else [0, 0])
        assert (anomalies.weights is None) == (number != 1)
        assert store.find("fit", stage_key("fit", VERSION, {"number": number})) is not None
    assert done[1][1].weights.tolist() == [1, 2, 3, 4]


def test_checkpoints_are_written_now_and_then(tmp_path):
    training = SharedTraining(Store(str(tmp_path)), "key")
    training.keep("image", lambda: pytest.fail("too soon"))
    training._kept = time.monotonic() - 2 * fits.CHECKPOINT_SECONDS
    training.keep("image", lambda: b"state")
    assert training.read("image") == b"state"
    assert training.read("patch") is None
    training.keep("image", lambda: pytest.fail("too soon"))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.skipif(not assets.is_present("builtin:efficientnet-lite0"), reason="needs EfficientNet-Lite0: `kka setup`")
def test_one_and_two_train_workers_fit_the_same_detectors(tmp_path):
    store = Store(str(tmp_path / "store"))
    keys = {}
    for name, features in (("train", NORMALS), ("validation", VALIDATION), ("anomalies", ANOMALIES)):
        inputs = {"of": name}
        keys[name] = store.get_or_make("features", 1, inputs, lambda a, f=features: write_features(a, f)).key
    configs = (SimpleNet(epochs=4, batch=16), Knn(kind="knn"))

    def fit(workers: int, share: str) -> list[np.ndarray]:
        wanted = []
        for config in configs:
            inputs = {"kind": config.kind, "workers": workers, "share": share, "versions": versions.computing()}
            wanted.append(
                {
                    "detector": config,
                    "train": keys["train"],
                    "anomalies": keys["anomalies"],
                    "views": None,
                    "weights": None,
                    "seed": 0,
                    "inputs": inputs,
                }
            )
        arguments = {
            "store": store.uri,
            "backbone": BackboneConfig(),
            "backbone_identity": Backbone.load(BackboneConfig()).identity,
            "patches": True,
            "validation": keys["validation"],
            "false_positive_rate": 0.05,
            "share": share,
            "fits": wanted,
        }
        cluster = ClusterConfig(train_cpus=0.5, train_threads=1, max_restarts=0)
        train.run("test-fits", fit_worker, arguments, workers, cluster)
        outputs = [store.find("fit", stage_key("fit", VERSION, w["inputs"])) for w in wanted]
        return [TunedDetector.load(o.local / "detector").score(TEST).score for o in outputs if o is not None]

    alone, together, apart = fit(1, "steps"), fit(2, "steps"), fit(2, "fits")
    assert len(alone) == len(together) == len(apart) == 2
    for one, two, each in zip(alone, together, apart, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-3)
        assert np.array_equal(each, one)
