"""The vLLM engine against transformers, on the same weights and adapters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
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
from tests.needs import VLLM

MODEL = "builtin:smollm2-135m-instruct"
PROMPTS = [
    "A list of flowers:\n- a white flower with five petals\n- a pink flower with six petals\n-",
    "A list of flowers:\n- a yellow tulip\n-",
]
LINES = [" a red flower with seven long petals\n", " a blue car in the street\n"]

pytestmark = [
    *VLLM,
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


@dataclass(frozen=True)
class Policy:
    """Log-probabilities by transformers in float32 of every line after every prompt, and how far bfloat16 is off."""

    log_probs: np.ndarray
    rounding: float

    def distance(self, log_probs: np.ndarray) -> float:
        """Mean difference of a token's log-probability, in nats."""
        return float(np.abs(log_probs - self.log_probs).mean())


@pytest.fixture(scope="module")
def policies(adapters: list[Path]) -> dict[Path | None, Policy]:
    """The base model's policy and those of the adapters, far enough from each other to be told apart."""
    exact = TransformersEngine(DescribeConfig(sampler=TransformersSampler(dtype="float32")))
    rounded = TransformersEngine(DescribeConfig(sampler=TransformersSampler(dtype="bfloat16")))
    found = {}
    for folder in (None, *adapters):
        exact.load_adapter(folder)
        rounded.load_adapter(folder)
        values = all_log_probs(exact)
        found[folder] = Policy(values, float(np.abs(all_log_probs(rounded) - values).mean()))
    for one, other in itertools.combinations(found.values(), 2):
        assert one.distance(other.log_probs) > 5 * max(one.rounding, other.rounding)
    return found


@pytest.fixture(scope="module", params=["merged", "lora"])
def started(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    sampler = VllmSampler(
        kind="vllm", dtype="bfloat16", kv_cache_gib=0.25, max_model_len=256, adapter=request.param, max_lora_rank=8
    )
    with engine_process(DescribeConfig(sampler=sampler, max_tokens=12)) as process:
        yield process


@pytest.fixture
def engine(started: EngineProcess) -> EngineProcess:
    """The engine with the base model, whatever an earlier test left in it."""
    started.load_adapter(None)
    return started


def all_log_probs(engine: TransformersEngine | EngineProcess) -> np.ndarray:
    rows = engine.log_probs([p for p in PROMPTS for _ in LINES], LINES * len(PROMPTS))
    return np.array([value for row in rows for value in row])


def sample_with(engine: EngineProcess, folder: Path | None) -> None:
    engine.load_adapter(folder)
    engine.sample(PROMPTS, 2, 0)


def test_the_policy_follows_the_adapter(
    engine: EngineProcess, adapters: list[Path], policies: dict[Path | None, Policy]
) -> None:
    """vLLM in bfloat16 is about as far from the exact policy as transformers in bfloat16 is.

    How far depends on the processor's instructions for bfloat16: up to 2.1 times as far was seen. Other policies are
    more than 5 times as far.
    """
    for folder in (None, adapters[0], adapters[1], None, adapters[0]):
        # Fills the prefix cache with states that the next adapter must not find.
        sample_with(engine, folder)
        assert policies[folder].distance(all_log_probs(engine)) < 3 * policies[folder].rounding


def test_an_adapter_that_cannot_be_read_does_not_spoil_the_engine(engine: EngineProcess, tmp_path: Path) -> None:
    before = engine.log_probs(PROMPTS, LINES)
    with pytest.raises(Exception, match=str(tmp_path)):
        sample_with(engine, tmp_path)
    engine.load_adapter(None)
    assert engine.log_probs(PROMPTS, LINES) == before


def test_what_is_written_comes_from_the_adapters_policy(engine: EngineProcess, adapters: list[Path]) -> None:
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
    assert means[None, None] > means[None, adapters[0]] + 0.2
    assert means[adapters[0], adapters[0]] > means[adapters[0], None] + 0.2


def test_every_prompt_has_its_lines_and_every_line_its_seed(engine: EngineProcess) -> None:
    written = engine.sample(PROMPTS, 8, 3)
    assert [len(lines) for lines in written] == [8, 8]
    assert all(line.count("\n") == line.endswith("\n") for lines in written for line in lines)
    assert len({line for lines in written for line in lines}) > 8
    assert engine.sample(PROMPTS, 8, 4) != written


def test_more_prompts_than_fit_into_one_step(engine: EngineProcess) -> None:
    """Together they have more tokens than a step takes, so that one of them would have to be split."""
    prompts = [f"{number}. " + "a white flower with five petals, " * 26 + "\n-" for number in range(24)]
    lines = engine.sample(prompts, 2, 0)
    assert [len(own) for own in lines] == [2] * 24


def test_nothing_outside_the_machine_can_reach_it(engine: EngineProcess) -> None:
    assert {ip for ip, _ in engine.listening()} <= {"127.0.0.1", "::1"}


def test_a_prompt_that_is_too_long_is_named(engine: EngineProcess) -> None:
    with pytest.raises(StageError, match=r"max_model_len \(256\)"):
        engine.sample(["a flower " * 300], 1, 0)


def test_the_end_of_the_text_ends_the_line(engine: EngineProcess) -> None:
    answer = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\nYes"
    (lines,) = engine.sample([answer], 8, 0)
    assert ".\n" in lines
    assert "." not in lines
