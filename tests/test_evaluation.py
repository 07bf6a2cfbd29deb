from kka_ray.config.models import AnomalyWeights
from kka_ray.evaluation import verdict_weights
from kka_ray.records import Verdict


def test_images_weigh_by_their_last_verdict_and_alike_by_default() -> None:
    verdicts = {
        id_: Verdict(id_, 0, 0, 1.0, 1.0, label)
        for id_, label in (("a", "hard"), ("b", "easy"), ("c", "between"), ("d", "hard"))
    }
    assert verdict_weights(AnomalyWeights(), list(verdicts), verdicts) is None
    assert verdict_weights(AnomalyWeights(hard=3, easy=0.5), ["d", "b", "c", "a"], verdicts) == (3, 0.5, 1, 3)
    assert verdict_weights(AnomalyWeights(hard=3), ["a", "d"], verdicts) is None, "only ratios matter"
