"""Row of `throughput.py` about DPO: our step against that of TRL's own trainer."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.captions import few_shot_prompts
from kka_ray import assets, versions
from kka_ray.config.models import PreferenceConfig
from kka_ray.data import flowers
from kka_ray.records import PreferencePair

MODEL = "builtin:smollm2-135m-instruct"
PROMPTS = 8
"""Prompts of the round; pairs never mix them."""


def dpo_over_trl(pairs: int = 64, steps: int = 4, turns: int = 3) -> dict[str, Any]:
    """Seconds of a step of TRL's trainer over ours: the same model, pairs, adapter, batch of 8 and bfloat16 weights.

    TRL runs twice: as the row counts it, with gradient checkpointing off as in ours, and in its default settings, which
    `over_default` in the details is about. A step is timed from the beginning of one to that of the next, without the
    first; so the log-probabilities of the reference are counted on both sides.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = flower_pairs(pairs)
    config = PreferenceConfig(steps=steps + 1, batch=8, micro_batch=8, warmup=0, dtype="bfloat16")
    sides: dict[str, list[float]] = {"ours": [], "trl": [], "trl_default": []}
    for _ in range(turns):
        for name, seconds in sides.items():
            seconds.append(_step_seconds(name, rows, config))
    median = {name: statistics.median(seconds) for name, seconds in sides.items()}
    details = {
        "over_default": median["trl_default"] / median["ours"],
        "step_seconds": sides,
        "pairs_a_step": config.batch,
        "threads": torch.get_num_threads(),
        "versions": versions.all_versions(),
    }
    return {"dpo_over_trl": median["trl"] / median["ours"], "dpo_over_trl_details": details}


def flower_pairs(count: int) -> list[PreferencePair]:
    """Pairs as a round of the demo has them: few-shot prompts, each with disjoint pairs of captions of one line."""
    rng = np.random.default_rng(0)

    def caption() -> str:
        return f" {flowers.caption(flowers.sample_normal(rng), flowers.sample_scene(rng), rng)}\n"

    prompts = few_shot_prompts(PROMPTS)
    return [
        PreferencePair(f"p{i % PROMPTS}", f"a{i}", f"b{i}", prompts[i % PROMPTS], caption(), caption())
        for i in range(count)
    ]


def _step_seconds(side: str, pairs: list[PreferencePair], config: PreferenceConfig) -> float:
    """Median seconds of a step of a new training."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOTrainer

    from kka_ray.preference import dpo
    from kka_ray.preference.packing import Packer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.begun: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun.append(time.perf_counter())

    path, clock = assets.resolve(MODEL).path, Clock()
    with tempfile.TemporaryDirectory() as work:
        arguments = dpo._arguments(config, 0, Path(work), 1, cpu=not torch.cuda.is_available())
        if side == "trl_default":
            arguments.gradient_checkpointing = True
        trainer = (dpo.PackedDPOTrainer if side == "ours" else DPOTrainer)(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype)),
            args=arguments,
            train_dataset=Dataset.from_list(
                [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
            ),
            processing_class=AutoTokenizer.from_pretrained(path),
            peft_config=dpo._lora(config),
            callbacks=[clock],
            **({"data_collator": Packer(config.max_length)} if side == "ours" else {}),
        )
        trainer.train()
    return statistics.median(np.diff(clock.begun)[1:].tolist())
