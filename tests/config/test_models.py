import pytest
from pydantic import ValidationError

from kka_ray.config.models import FusedEvaluator, PoolConfig, PreferenceConfig
from kka_ray.config.renderer import RendererConfig


@pytest.mark.parametrize(
    ("values", "remedy"), [({"batch": 12}, "set it to 16"), ({"workers": 3}, "3 x 8.*set it to 24")]
)
def test_a_batch_is_shared_out_whole(values: dict[str, int], remedy: str) -> None:
    with pytest.raises(ValidationError, match=remedy):
        PreferenceConfig.model_validate(values)
    assert PreferenceConfig(batch=12, workers=3, micro_batch=4).batch == 12


@pytest.mark.parametrize(
    ("values", "remedy"), [({}, "raise workers"), ({"workers": 2, "load_in_4bit": True}, "set load_in_4bit to false")]
)
def test_what_cannot_be_sharded_is_refused(values: dict[str, object], remedy: str) -> None:
    with pytest.raises(ValidationError, match=remedy):
        PreferenceConfig.model_validate({"sharding": "fsdp", **values})
    assert PreferenceConfig(sharding="fsdp", workers=2).sharding == "fsdp"


def test_how_pairs_are_chosen_is_no_part_of_their_training() -> None:
    training = PreferenceConfig().training()
    assert training == PreferenceConfig(rejected=("normal_like",), min_pairs=2, max_pairs=9).training()
    assert training != PreferenceConfig(beta=0.2).training()


def test_an_evaluator_on_pixels_is_not_fused_with_one_on_features() -> None:
    with pytest.raises(ValidationError, match="use kind: deep_sad"):
        FusedEvaluator.model_validate({"deep_sad": {"input": "pixels"}})


def test_a_pool_that_may_not_have_its_workers_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_workers \(1\) is less than workers \(2\)"):
        PoolConfig(workers=2, max_workers=1)
    assert PoolConfig(workers=2, max_workers=3, gpus=0.5).max_workers == 3


def test_several_workers_of_a_renderers_training_do_not_share_a_gpu() -> None:
    def config(gpus: float, workers: int, device: str = "auto") -> RendererConfig:
        values = {"name": "x", "sources": [{"kind": "flowers"}], "training": {"steps": 1}, "workers": workers}
        return RendererConfig.model_validate(values | {"cluster": {"train_gpus": gpus, "device": device}})

    with pytest.raises(ValidationError, match=r"2 workers of 0\.5 GPU each may share a GPU, which NCCL refuses"):
        config(0.5, 2)
    for allowed in (config(0.5, 1), config(1, 2), config(0.5, 2, "cpu")):
        assert allowed.workers
