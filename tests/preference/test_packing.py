import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kka_ray.errors import StageError
from kka_ray.preference.packing import Packer, SamePromptSampler, log_probs

PAIRS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": [11, 12, 13]},
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": [14]},
    {"prompt_ids": [20, 21], "chosen_ids": [11, 12, 13], "rejected_ids": [9, 10]},
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def alone(model: LlamaForCausalLM, prompt: tuple[int, ...], line: tuple[int, ...]) -> float:
    logits = model(torch.tensor([[*prompt, *line]])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) + k - 1, token]) for k, token in enumerate(line))


def test_packed_lines_have_the_log_probabilities_they_have_alone(model: LlamaForCausalLM) -> None:
    batch = Packer(64)(PAIRS)
    with torch.inference_mode():
        ours = log_probs(model, batch)
        theirs = [alone(model, *line) for line in batch["lines"]]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-4)


def test_each_prompt_and_each_line_is_read_once() -> None:
    batch = Packer(64)(PAIRS)
    assert batch["input_ids"].shape == (1, (4 + 2 + 3 + 1) + (2 + 3 + 2))
    assert len(batch["lines"]) == 5
    assert [batch["lines"][i][1] for i in batch["chosen"]] == [(9, 10), (9, 10), (11, 12, 13)]
    assert [batch["lines"][i][1] for i in batch["rejected"]] == [(11, 12, 13), (14,), (9, 10)]


def test_long_lines_are_cut() -> None:
    batch = Packer(6)(PAIRS[:1])
    assert [line for _, line in batch["lines"]] == [(9, 10), (11, 12)]


def test_a_prompt_that_leaves_no_room_for_its_lines_is_an_error() -> None:
    for max_length in (3, 4):
        with pytest.raises(StageError, match=r"4 of the . tokens of preference\.max_length.*describe\.examples"):
            Packer(max_length)(PAIRS[:1])
    assert len(Packer(5)(PAIRS[:1])["lines"]) == 2


def test_lines_that_a_cut_would_make_equal_are_an_error() -> None:
    alike = {"prompt_ids": [5, 6], "chosen_ids": [9, 10, 11], "rejected_ids": [9, 10, 12]}
    with pytest.raises(StageError, match=r"preference\.max_length"):
        Packer(4)([alike])
    assert len(Packer(5)([alike])["lines"]) == 2


def test_the_sampler_gives_all_pairs_in_blocks_of_few_prompts() -> None:
    prompts = [(i % 5,) for i in range(43)]
    sampler = SamePromptSampler(prompts, 4, seed=0)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(43))
    assert first != second
    blocks = [first[i : i + 4] for i in range(0, 40, 4)]
    # 8 or 9 pairs a prompt: at most the four borders between prompts fall into a block.
    assert sum(len({prompts[i] for i in block}) > 1 for block in blocks) <= 4
    assert first == list(SamePromptSampler(prompts, 4, seed=0))
