from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kka_ray import assets
from kka_ray.config.models import DescribeConfig, PreferenceConfig, TransformersSampler
from kka_ray.describe.transformers_sampler import TransformersEngine
from kka_ray.errors import StageError
from kka_ray.records import PreferencePair

MODEL = "builtin:smollm2-135m-instruct"
PROMPT = "A list of flowers:\n- a white flower with five petals\n- a pink flower with six petals\n-"

pytestmark = pytest.mark.skipif(not assets.is_present(MODEL), reason="the built-in models are missing: run `kka setup`")


def pairs() -> list[PreferencePair]:
    colours = ["red", "blue", "yellow", "orange"]
    return [
        PreferencePair(
            "p0", f"a{i}", f"b{i}", PROMPT, f" a {c} flower with five petals\n", f" a {c} car in the street\n"
        )
        for i, c in enumerate(colours)
    ]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two rounds of training, the second with either reference policy."""
    from kka_ray.preference.dpo import train_dpo

    folder = tmp_path_factory.mktemp("dpo")
    config = PreferenceConfig(steps=4, batch=4, micro_batch=4, warmup=0, learning_rate=1e-3)
    results = {}
    for name, previous, reference in (
        ("first", None, "base"),
        ("base", "first", "base"),
        ("previous", "first", "previous"),
    ):
        settings = config.model_copy(update={"reference": reference})
        before = folder / previous if previous else None
        results[name] = train_dpo(pairs(), MODEL, before, settings, 0, folder / name, folder / "work", cpu=True)
    assert all(r.loss_last < r.loss_first and r.margin > 0 for r in results.values())
    # Against the base model the second round begins where the first one ended; against that one it begins at ln 2.
    assert results["base"].loss_first < 0.6
    assert results["previous"].loss_first == pytest.approx(0.6931, abs=1e-3)
    return {name: folder / name for name in results}


@pytest.mark.parametrize("sft", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_packed_batches_train_as_trl_does(tmp_path: Path, sft: float) -> None:
    """Step for step the loss of TRL's own trainer, which reads a padded row a line."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOTrainer

    from kka_ray.preference import dpo

    config = PreferenceConfig(steps=3, batch=4, micro_batch=4, warmup=0, learning_rate=1e-3, sft=sft)
    ours = dpo.train_dpo(pairs(), MODEL, None, config, 0, tmp_path / "adapter", tmp_path / "ours", cpu=True)
    path = assets.resolve(MODEL).path
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=dpo._arguments(config, 0, tmp_path / "theirs", 1, cpu=True),
        train_dataset=Dataset.from_list(
            [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs()]
        ),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=dpo._lora(config),
    )
    end = trainer.processing_class.eos_token_id
    assert all(row["chosen_ids"][-1] == row["rejected_ids"][-1] == end for row in trainer.train_dataset)
    # Sampling ends with the line, so ours does not learn what TRL puts behind it.
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row: {side: row[side][:-1] for side in ("chosen_ids", "rejected_ids")}
    )
    trainer.train()
    theirs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [row["loss"] for row in ours.history] == pytest.approx(theirs, abs=2e-4)
    assert theirs[-1] < theirs[0] - 0.05


def test_a_pair_that_has_no_room_is_an_error(tmp_path: Path) -> None:
    from kka_ray.preference.dpo import train_dpo

    long = replace(pairs()[0], prompt=PROMPT * 20)
    config = PreferenceConfig(steps=1, warmup=0, batch=4, micro_batch=4, max_length=100)
    with pytest.raises(StageError, match=r"1 of \d+ pairs have prompts of 100 tokens or more.*max_length"):
        train_dpo([*pairs(), long], MODEL, None, config, 0, tmp_path / "adapter", tmp_path / "work", cpu=True)


@pytest.mark.parametrize("name", ["base", "previous"])
def test_every_round_changes_the_adapter(adapters: dict[str, Path], name: str) -> None:
    first = load_file(adapters["first"] / "adapter_model.safetensors")
    second = load_file(adapters[name] / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", ["first", "base", "previous"])
def test_the_sampler_has_the_trained_policy(adapters: dict[str, Path], name: str) -> None:
    """Token for token, against PEFT on the raw base model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    engine = TransformersEngine(DescribeConfig(sampler=TransformersSampler(dtype="float32")))
    text = pairs()[0].chosen
    untuned = engine.log_probs([PROMPT], [text])[0]
    engine.load_adapter(adapters[name])
    ours = engine.log_probs([PROMPT], [text])[0]

    path = assets.resolve(MODEL).path
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, str(adapters[name])).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt, completion = tokenizer(PROMPT)["input_ids"], tokenizer(text)["input_ids"]
    with torch.inference_mode():
        logits = policy(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    theirs = [float(logits[len(prompt) + k - 1, token]) for k, token in enumerate(completion)]
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(ours, untuned, strict=True)) > 1e-2
    engine.load_adapter(None)
    assert engine.log_probs([PROMPT], [text])[0] == untuned


def test_sampling_repeats_and_differs_by_seed() -> None:
    engine = TransformersEngine(DescribeConfig(max_tokens=8))
    one = engine.sample([PROMPT, PROMPT + " a"], 4, seed=5)
    assert one == engine.sample([PROMPT, PROMPT + " a"], 4, seed=5)
    assert one != engine.sample([PROMPT, PROMPT + " a"], 4, seed=6)
    assert [len(lines) for lines in one] == [4, 4]
