"""The vLLM engine against transformers, on the same weights and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from kka_ray import assets
from kka_ray.config.models import DescribeConfig, TransformersSampler, VllmSampler
from kka_ray.describe.transformers_sampler import TransformersEngine
from kka_ray.errors import StageError
from tests.describe.engine_process import EngineProcess, engine_process

MODEL = "builtin:smollm2-135m-instruct"
PROMPTS = [
    "A list of flowers:\n- a white flower with five petals\n- a pink flower with six petals\n-",
    "A list of flowers:\n- a yellow tulip\n-",
]
LINES = [" a red flower with seven long petals\n", " a blue car in the street\n"]
TOLERANCE = 0.2
"""Of a token's log-probability, in nats, on average: rounding to bfloat16 does 0.14 here."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: run `make test-vllm`"),
    pytest.mark.skipif(not assets.is_present(MODEL), reason="the built-in models are missing: run `kka setup`"),
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters that change every linear layer by chance, enough to be seen in every token."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(assets.resolve(MODEL).path, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
        folders.append(tmp_path_factory.mktemp(f"adapter-{seed}"))
        model.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def wanted(adapters: list[Path]) -> dict[Path | None, np.ndarray]:
    """Log-probabilities by transformers in float32: of every line after every prompt, under each policy."""
    engine = TransformersEngine(DescribeConfig(sampler=TransformersSampler(dtype="float32")))
    found = {}
    for folder in (None, *adapters):
        engine.load_adapter(folder)
        found[folder] = all_log_probs(engine)
    # What is checked below must be told apart by it.
    assert min(np.abs(found[None] - found[a]).mean() for a in adapters) > 4 * TOLERANCE
    assert np.abs(found[adapters[0]] - found[adapters[1]]).mean() > 4 * TOLERANCE
    return found


@pytest.fixture(scope="module", params=["merged", "lora"])
def engine(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    sampler = VllmSampler(
        kind="vllm", dtype="bfloat16", kv_cache_gib=0.25, max_model_len=256, adapter=request.param, max_lora_rank=8
    )
    with engine_process(DescribeConfig(sampler=sampler, max_tokens=12)) as process:
        yield process


def all_log_probs(engine: TransformersEngine | EngineProcess) -> np.ndarray:
    rows = engine.log_probs([p for p in PROMPTS for _ in LINES], LINES * len(PROMPTS))
    return np.array([value for row in rows for value in row])


def test_the_policy_follows_the_adapter(
    engine: EngineProcess, adapters: list[Path], wanted: dict[Path | None, np.ndarray]
) -> None:
    for folder in (None, adapters[0], adapters[1], None, adapters[1], adapters[0]):
        engine.load_adapter(folder)
        # Fills the prefix cache with states that the next adapter must not find.
        engine.sample(PROMPTS, 2, 0)
        assert np.abs(all_log_probs(engine) - wanted[folder]).mean() < TOLERANCE
    engine.load_adapter(None)


def test_what_is_written_comes_from_the_adapters_policy(
    engine: EngineProcess, adapters: list[Path], wanted: dict[Path | None, np.ndarray]
) -> None:
    """Lines are likelier under the policy that wrote them than under the other."""
    own = TransformersEngine(DescribeConfig(sampler=TransformersSampler(dtype="float32")))
    means = {}
    for writer in (None, adapters[0]):
        engine.load_adapter(writer)
        lines = engine.sample(PROMPTS, 16, 1)
        for judge in (None, adapters[0]):
            own.load_adapter(judge)
            rows = own.log_probs([p for p in PROMPTS for _ in range(16)], [line for row in lines for line in row])
            means[writer, judge] = np.mean([value for row in rows for value in row])
    engine.load_adapter(None)
    assert means[None, None] > means[None, adapters[0]] + 0.2
    assert means[adapters[0], adapters[0]] > means[adapters[0], None] + 0.2


def test_every_prompt_has_its_lines_and_every_line_its_seed(engine: EngineProcess) -> None:
    written = engine.sample(PROMPTS, 8, 3)
    assert [len(lines) for lines in written] == [8, 8]
    assert all(line.count("\n") == line.endswith("\n") for lines in written for line in lines)
    assert len({line for lines in written for line in lines}) > 8
    assert engine.sample(PROMPTS, 8, 4) != written


def test_nothing_outside_the_machine_can_reach_it(engine: EngineProcess) -> None:
    assert {ip for ip, _ in engine.listening()} <= {"127.0.0.1", "::1"}


def test_a_prompt_that_is_too_long_is_named(engine: EngineProcess) -> None:
    with pytest.raises(StageError, match=r"max_model_len \(256\)"):
        engine.sample(["a flower " * 300], 1, 0)
