import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from kka_ray.errors import ConfigError, StageError
from kka_ray.preference.packing import Packer, SamePromptSampler, check_packed, log_probs, mask_of

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


def tiny(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_a_model_whose_attention_adds_its_mask_gets_one_to_add() -> None:
    neo = GPTNeoConfig(
        vocab_size=32,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        initializer_range=0.5,
        max_position_embeddings=32,
    )
    model = tiny(neo)
    assert model.config._attn_implementation == "eager"
    check_packed(model, Packer(64, mask_of(model)), PAIRS, "neo", exact=True)
    assert model.training, "the mode is what it was"
    with pytest.raises(ConfigError, match=r"cannot train neo \(gpt_neo\)"):
        check_packed(model, Packer(64), PAIRS, "neo", exact=True)


def test_a_model_that_carries_a_state_from_line_to_line_is_refused(model: LlamaForCausalLM) -> None:
    assert mask_of(model) is None
    check_packed(model, Packer(64), PAIRS, "llama", exact=True)
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}
    hybrid = tiny(
        Lfm2Config(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_attention_heads=4, initializer_range=0.5, **layers
        )
    )
    with pytest.raises(ConfigError, match=r"cannot train org/hybrid \(lfm2\).*loop\.rounds=0"):
        check_packed(hybrid, Packer(64, mask_of(hybrid)), PAIRS, "org/hybrid", exact=True)


def test_windows_of_attention_are_seen_in_the_longest_pair() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    window = {"sliding_window": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
    model = tiny(MistralConfig(vocab_size=32, **sizes, **window))
    with pytest.raises(ConfigError, match="cannot train org/windows"):
        check_packed(model, Packer(64), PAIRS, "org/windows", exact=True)


def test_each_prompt_and_each_line_is_read_once() -> None:
    batch = Packer(64)(PAIRS)
    assert batch["input_ids"].shape == (1, (4 + 2 + 3 + 1) + (2 + 3 + 2))
    assert len(batch["lines"]) == 5
    assert [batch["lines"][i][1] for i in batch["chosen"]] == [(9, 10), (9, 10), (11, 12, 13)]
    assert [batch["lines"][i][1] for i in batch["rejected"]] == [(11, 12, 13), (14,), (9, 10)]


def test_long_lines_are_cut() -> None:
    batch = Packer(6)(PAIRS[:1])
    assert [line for _, line in batch["lines"]] == [(9, 10), (11, 12)]


def test_what_is_never_written_is_not_learnt() -> None:
    ended = [{k: ids + [1] * (k != "prompt_ids") for k, ids in pair.items()} for pair in PAIRS]
    plain, packed = Packer(64)(PAIRS), Packer(64, end=1)(ended)
    assert packed["lines"] == plain["lines"]
    assert torch.equal(packed["targets"], plain["targets"])
    assert Packer(64, end=1)(PAIRS)["lines"] == plain["lines"]


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
