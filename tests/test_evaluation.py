import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kka_ray import evaluation
from kka_ray.cluster.streaming import Drawn
from kka_ray.config.models import AnomalyWeights, DetectConfig, FlowersData, Knn, LinearHead, RunConfig
from kka_ray.errors import StageError
from kka_ray.evaluation import Evaluation, headline_detector, unseen_drawn_normals, verdict_weights
from kka_ray.features.base import Features
from kka_ray.loop import LoopResult
from kka_ray.records import Verdict
from kka_ray.store import Store, stage_key


def test_images_weigh_by_their_last_verdict_and_alike_by_default() -> None:
    verdicts = {
        id_: Verdict(id_, 0, 0, 1.0, 1.0, label)
        for id_, label in (("a", "hard"), ("b", "easy"), ("c", "between"), ("d", "hard"))
    }
    assert verdict_weights(AnomalyWeights(), list(verdicts), verdicts) is None
    assert verdict_weights(AnomalyWeights(hard=3, easy=0.5), ["d", "b", "c", "a"], verdicts) == (3, 0.5, 1, 3)
    assert verdict_weights(AnomalyWeights(hard=3), ["a", "d"], verdicts) is None, "only ratios matter"


def test_the_control_of_artefacts_is_not_measured_on_what_the_detector_learned() -> None:
    pooled = np.arange(5, dtype=np.float32)[:, None]
    result = LoopResult([], normals=Drawn(ids=list("abcde"), features=Features(pooled)))

    def unseen(learned: bool) -> list[float]:
        detect = DetectConfig(drawn_normals=learned)
        config = RunConfig(name="x", data=FlowersData(kind="flowers"), detect=detect)
        return unseen_drawn_normals(config, result).pooled[:, 0].tolist()

    assert unseen(False) == [0, 1, 2, 3, 4]
    assert unseen(True) == [1, 3]


def test_a_headline_that_needs_anomalies_and_has_none_is_an_error_that_says_so() -> None:
    detect = DetectConfig(detectors=(Knn(kind="knn"), LinearHead(kind="fused")), headline="fused")
    config = RunConfig(name="x", data=FlowersData(kind="flowers"), detect=detect)
    fits = {("knn", "baseline", 0): "k"}
    with pytest.raises(StageError, match=r"kept no image and the detector fused needs anomalies; raise loop\.lines"):
        headline_detector(config, None, None, Evaluation([], fits, [], 0, 0))  # type: ignore[arg-type]


def test_fits_are_counted_as_they_come_into_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_LOOK_SECONDS", 0.02)
    store, heard = Store(str(tmp_path)), []
    keys = [stage_key("fit", 1, {"n": n}) for n in range(3)]
    with evaluation._counting(store, keys, heard.append):
        for n in range(2):
            store.get_or_make("fit", 1, {"n": n}, lambda attempt: attempt.write("data", b"0"))
        deadline = time.monotonic() + 10
        while 2 not in heard and time.monotonic() < deadline:
            time.sleep(0.02)
    assert heard[-1] == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "kka-fits"]
