"""Rows of `throughput.py` about captions, written by the built-in language model: our engines and others' ways.

Both sides of a ratio take turns in one process, and the ratio is that of their median times.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kka_ray import versions
from kka_ray.config.models import DescribeConfig, TransformersSampler, VllmSampler
from kka_ray.data import flowers
from kka_ray.describe.sampler import Sampler, build_sampler, engine_versions
from kka_ray.describe.transformers_sampler import TransformersEngine

LINES = 16
"""Captions for each prompt, as in the demo."""


def captions_over_reference(captions: int = 256, turns: int = 3) -> dict[str, Any]:
    """Captions a second of our transformers engine over the reference's way: one prompt at a time, greedy, and the
    whole prefix computed again for each token. Both in bfloat16; the reference writes one caption for eight prompts.
    """
    engine, prompts = _transformers("bfloat16"), few_shot_prompts(captions // LINES)
    few = prompts[:8]
    times = in_turns(turns, {"ours": lambda: _ours(engine, prompts), "reference": lambda: _one_at_a_time(engine, few)})
    per_second = {
        "ours": len(prompts) * LINES / statistics.median(times["ours"]),
        "reference": len(few) / statistics.median(times["reference"]),
    }
    details = {"captions_per_second": per_second, "seconds": times, **_about()}
    return {
        "captions_over_reference": per_second["ours"] / per_second["reference"],
        "captions_over_reference_details": details,
    }


def captions_over_generate_float32(captions: int = 256, turns: int = 3) -> dict[str, Any]:
    """Our transformers engine over plain batched `generate`, in float32."""
    return _over_generate("captions_over_generate_float32", "float32", captions, turns)


def captions_over_generate_bf16(captions: int = 256, turns: int = 3) -> dict[str, Any]:
    """The same in bfloat16."""
    return _over_generate("captions_over_generate_bf16", "bfloat16", captions, turns)


def vllm_over_transformers(captions: int = 256, turns: int = 3) -> dict[str, Any]:
    """vLLM over our transformers engine, both in bfloat16 and loaded once. Needs the environment of `make setup-vllm`.

    `with_start` in the details counts loading the engines as well.
    """
    sampler = VllmSampler(kind="vllm", dtype="bfloat16", kv_cache_gib=0.5, max_model_len=512)
    engine_versions(sampler)  # says what to do where vLLM is missing
    prompts = few_shot_prompts(captions // LINES)
    started = time.perf_counter()
    ours = _transformers("bfloat16")
    loaded = time.perf_counter()
    # vLLM computes with as many threads as torch was set to before.
    vllm = build_sampler(DescribeConfig(sampler=sampler))
    start = {"transformers": loaded - started, "vllm": time.perf_counter() - loaded}
    times = in_turns(turns, {"transformers": lambda: _ours(ours, prompts), "vllm": lambda: _ours(vllm, prompts)})
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    with_start = {name: start[name] + median[name] for name in median}
    return {
        "vllm_over_transformers": median["transformers"] / median["vllm"],
        "vllm_over_transformers_details": {
            "with_start": with_start["transformers"] / with_start["vllm"],
            "start_seconds": start,
            "seconds": times,
            **_about(),
        },
    }


def few_shot_prompts(count: int) -> list[str]:
    """Prompts as the demo builds them: three captions of normal flowers, then the turn to others. Always the same."""
    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(count):
        shown = (flowers.caption(flowers.sample_normal(rng), flowers.sample_scene(rng), rng) for _ in range(3))
        listed = "".join(f"- {text}\n" for text in shown)
        turn = "Rare flowers of other species, with petals of other colors, shapes and numbers:"
        prompts.append(f"Common flowers:\n{listed}{turn}\n-")
    return prompts


def in_turns(turns: int, sides: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each side by name: a turn that does not count, then `turns` in which all sides run one by one."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _over_generate(name: str, dtype: str, captions: int, turns: int) -> dict[str, Any]:
    engine, prompts = _transformers(dtype), few_shot_prompts(captions // LINES)
    times = in_turns(turns, {"ours": lambda: _ours(engine, prompts), "generate": lambda: _generate(engine, prompts)})
    ratio = statistics.median(times["generate"]) / statistics.median(times["ours"])
    return {name: ratio, f"{name}_details": {"captions": len(prompts) * LINES, "seconds": times, **_about()}}


def _transformers(dtype: str) -> TransformersEngine:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return TransformersEngine(DescribeConfig(sampler=TransformersSampler.model_validate({"dtype": dtype})))


def _ours(engine: Sampler, prompts: Sequence[str]) -> None:
    engine.sample(prompts, LINES, seed=0)


@torch.inference_mode()
def _generate(engine: TransformersEngine, prompts: Sequence[str]) -> list[str]:
    """As the documentation of transformers has it: a padded batch, sampled to the full length, cut to a line after."""
    tokenizer, model, config = engine.tokenizer, engine.model, engine.config
    rows = [prompt for prompt in prompts for _ in range(LINES)]
    out = []
    for start in range(0, len(rows), engine.batch):
        batch = tokenizer(rows[start : start + engine.batch], return_tensors="pt", padding=True)
        ids = model.generate(
            **batch,
            do_sample=True,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        out += [text.split("\n")[0] for text in texts]
    return out


@torch.inference_mode()
def _one_at_a_time(engine: TransformersEngine, prompts: Sequence[str]) -> list[str]:
    """As the authors' code writes captions."""
    tokenizer, model = engine.tokenizer, engine.model
    out = []
    for prompt in prompts:
        batch = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(
            **batch,
            do_sample=False,
            use_cache=False,
            max_new_tokens=engine.config.max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        out.append(tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
    return out


def _about() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "versions": versions.all_versions()}
