from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config, LlamaConfig

from kka_ray import assets
from kka_ray.config.models import DescribeConfig, TransformersSampler
from kka_ray.describe.transformers_sampler import TransformersEngine, _check_cache, _nucleus
from kka_ray.errors import ConfigError

MODEL = "builtin:smollm2-135m-instruct"
PROMPTS = [
    "Common flowers:\n- a white flower with six narrow petals and a yellow centre\n- a pink flower\nRare flowers:\n-",
    "Animals:\n- a cat\n-",
    "Furniture of a house:\n- a wooden chair with four legs\n- a long table\n-",
]

pytestmark = pytest.mark.skipif(not assets.is_present(MODEL), reason="the built-in models are missing: run `kka setup`")


def engine(**options: float) -> TransformersEngine:
    sampler = TransformersSampler(dtype="float32", batch=4)
    return TransformersEngine(DescribeConfig(sampler=sampler, max_tokens=8, **options))  # type: ignore[arg-type]


def test_a_model_whose_state_cannot_be_shared_is_refused() -> None:
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    with pytest.raises(ConfigError, match="org/hybrid has layers without a key-value cache .lfm2.*kind=vllm"):
        _check_cache(Lfm2Config(**layers), "org/hybrid")
    _check_cache(LlamaConfig(num_hidden_layers=2), "org/llama")


def test_every_prompt_gets_its_own_lines_whatever_is_batched_with_it() -> None:
    """With hardly any chance left, a prompt's lines are what the model says to that prompt alone."""
    greedy = engine(temperature=1e-4)
    together = greedy.sample(PROMPTS, 2, seed=0)
    assert together == [greedy.sample([prompt], 2, seed=5)[0] for prompt in PROMPTS]
    assert all(len(set(lines)) == 1 for lines in together)
    assert len({lines[0] for lines in together}) == 3


def test_the_same_seed_gives_the_same_lines_and_another_seed_others() -> None:
    sampler = engine()
    first = sampler.sample(PROMPTS, 4, seed=1)
    assert first == sampler.sample(PROMPTS, 4, seed=1)
    assert first != sampler.sample(PROMPTS, 4, seed=2)
    assert len({line for lines in first for line in lines}) > 6


def test_log_probabilities_are_those_of_one_plain_forward_pass() -> None:
    sampler, path = engine(), assets.resolve(MODEL).path
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    line = " a blue car\n"
    prompt_ids = tokenizer(PROMPTS[0])["input_ids"]
    ids = torch.tensor([prompt_ids + tokenizer(line, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        values = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    wanted = values[len(prompt_ids) - 1 :].tolist()
    short, found = sampler.log_probs([PROMPTS[0]] * 2, [" a\n", line])
    assert found == pytest.approx(wanted, abs=1e-3)
    assert len(short) < len(found)


def test_tokens_are_drawn_by_their_probability_from_the_likeliest_that_reach_top_p() -> None:
    probability = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    uniform = (torch.arange(7000) + 0.5) / 7000
    for top_p, kept in ((0.5, [1, 3]), (0.7, [1, 3]), (0.71, [1, 2, 3]), (0.01, [1]), (1.0, [0, 1, 2, 3, 4])):
        tokens = _nucleus(probability.log().expand(7000, -1), top_p, uniform)
        wanted = torch.zeros(5)
        wanted[kept] = probability[kept] / probability[kept].sum()
        torch.testing.assert_close(tokens.bincount(minlength=5) / 7000, wanted, atol=1e-3, rtol=0)


def test_lines_of_one_prompt_that_are_more_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, sizes = engine(), []
    draw = sampler._sample_batch

    def noted(prompts: list[str], count: int, generator: torch.Generator) -> list[list[str]]:
        sizes.append(len(prompts) * count)
        return draw(prompts, count, generator)

    monkeypatch.setattr(sampler, "_sample_batch", noted)
    lines = sampler.sample(PROMPTS[:2], 10, seed=1)
    assert [len(of_prompt) for of_prompt in lines] == [10, 10]
    assert sizes == [4, 4, 2] * 2  # no more at once than `batch`
    assert len(set(lines[1])) > 5  # each batch draws with numbers of its own


def test_the_end_of_the_text_ends_the_line() -> None:
    answer = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\nYes"
    (lines,) = engine(temperature=1e-4).sample([answer], 1, seed=0)
    assert lines == [".\n"]
    (cut_off,) = engine(temperature=1e-4).sample(PROMPTS[2:], 1, seed=0)
    assert not cut_off[0].endswith("\n")
