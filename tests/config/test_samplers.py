from typing import Any

import pytest
from pydantic import ValidationError

from kka_ray.config import RunConfig


def run(sampler: dict[str, Any], rounds: int = 2, **pool: float) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "data": {"kind": "flowers"},
            "describe": {"sampler": sampler},
            "loop": {"rounds": rounds},
            "cluster": {"samplers": pool},
        }
    )


API = {"kind": "api", "base_url": "http://localhost:8000/v1", "model": "m"}


def test_an_api_is_refused_together_with_dpo() -> None:
    assert run(API, rounds=0).loop.rounds == 0
    with pytest.raises(ValidationError, match=r"DPO changes the model's weights.*Set loop\.rounds to 0"):
        run(API, rounds=1)


def test_an_api_has_one_worker_and_no_password_in_its_address() -> None:
    with pytest.raises(ValidationError, match=r"rate limit is kept by one worker"):
        run(API, rounds=0, workers=2)
    with pytest.raises(ValidationError, match=r"cluster\.samplers asks for 3 workers"):
        run(API, rounds=0, max_workers=3)
    with pytest.raises(ValidationError, match="base_url"):
        run(API | {"base_url": "https://user:password@host/v1"}, rounds=0)


@pytest.mark.parametrize(
    ("options", "pool"),
    [
        ({}, {}),
        ({}, {"gpus": 1}),
        ({"gpu_memory": 0.4}, {"gpus": 0.5}),
        ({"tensor_parallel": 4, "quantization": "fp8", "sleep_level": 1}, {"gpus": 4}),
        ({"adapter": "merged"}, {}),
    ],
)
def test_vllm_on_what_it_fits(options: dict[str, Any], pool: dict[str, float]) -> None:
    run({"kind": "vllm", **options}, **pool)


@pytest.mark.parametrize(
    ("options", "pool", "message"),
    [
        ({"tensor_parallel": 2}, {}, "tensor_parallel needs GPUs"),
        ({"quantization": "fp8"}, {}, "quantization needs GPUs"),
        ({"sleep_level": 1}, {}, "sleep_level needs GPUs"),
        ({"tensor_parallel": 2}, {"gpus": 1}, r"set cluster\.samplers\.gpus to 2"),
        ({}, {"gpus": 2}, "without tensor parallelism uses one"),
        ({"gpu_memory": 0.9}, {"gpus": 0.5}, "more than the sampler's share of a GPU"),
        ({"adapter": "merged", "quantization": "awq"}, {"gpus": 1}, "use lora"),
        ({"quantization": "squeeze"}, {"gpus": 1}, "quantization"),
    ],
)
def test_vllm_on_what_it_does_not_fit(options: dict[str, Any], pool: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run({"kind": "vllm", **options}, **pool)


def test_an_adapter_of_too_high_a_rank_is_refused() -> None:
    values = run({"kind": "vllm", "max_lora_rank": 8}).model_dump()
    with pytest.raises(ValidationError, match="lora_rank is 16"):
        RunConfig.model_validate(values | {"preference": {"lora_rank": 16}})
