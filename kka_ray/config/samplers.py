"""What writes the descriptions: a model in this process, a vLLM engine, or an API."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kka_ray.config.strict import URL, Strict, or_of_kind


class TransformersSampler(Strict):
    """Sampling with transformers: batched, with a key-value cache. Repeats bit for bit."""

    kind: Literal["transformers"] = "transformers"
    model: str = "builtin:smollm2-135m-instruct"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the device computes in it, else float32"
    )
    batch: int = Field(64, ge=1)
    trust_remote_code: bool = False

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset()
    """Fields that what is written does not depend on; they are no part of the store's keys."""


class VllmSampler(Strict):
    """Sampling with vLLM inside the sampler's actor. Continuous batching; does not promise to repeat bit for bit.

    Data parallelism is `cluster.samplers.workers`: an engine a worker.
    """

    kind: Literal["vllm"]
    model: str = "builtin:smollm2-135m-instruct"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel: int = Field(
        1, ge=1, description="GPUs that share the model; cluster.samplers.gpus must be as many"
    )
    gpu_memory: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory that the engine takes")
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="GiB of memory for the key-value cache; by default 1 on a CPU, and on a GPU what is left of "
        "`gpu_memory`, which must be given where others use the GPU as well: the engine takes their memory for its own",
    )
    max_model_len: int = Field(2048, ge=64, description="tokens of a prompt and what is written for it, together")
    max_sequences: int = Field(256, ge=1, description="lines that are written at a time")
    quantization: Literal["awq", "compressed-tensors", "fp8", "gptq"] | None = Field(
        None, description="needs a GPU; null reads what the model's own configuration says"
    )
    adapter: Literal["auto", "lora", "merged"] = Field(
        "auto", description="how a round's adapter is used; auto: lora on a GPU, merged into the weights on a CPU"
    )
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = Field(16, description="of adapters used as lora")
    eager: bool = Field(True, description="false compiles the model first: minutes to start, then faster on a GPU")
    sleep_level: Literal[0, 1, 2] = Field(
        0,
        description="on a GPU, while DPO trains: 0 stays awake, 1 keeps the weights in main memory, 2 drops them",
    )
    trust_remote_code: bool = False

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset({"gpu_memory", "kv_cache_gib", "sleep_level"})

    def check(self, gpus: float, lora_rank: int) -> None:
        """Raises ValueError if a sampler with so many GPUs (`cluster.samplers.gpus`) cannot run this.

        `lora_rank` is that of the rounds' adapters (`preference.lora_rank`).
        """
        if self.adapter == "merged" and (self.tensor_parallel > 1 or self.quantization):
            raise ValueError(
                "describe.sampler.adapter is merged, which works on plain weights in one process: use lora with "
                "tensor_parallel or quantization"
            )
        if lora_rank > self.max_lora_rank:
            raise ValueError(
                f"preference.lora_rank is {lora_rank}, more than describe.sampler.max_lora_rank ({self.max_lora_rank})"
            )
        if not gpus:
            for name, wanted in (("tensor_parallel", 1), ("quantization", None), ("sleep_level", 0)):
                if getattr(self, name) != wanted:
                    raise ValueError(f"describe.sampler.{name} needs GPUs: set cluster.samplers.gpus, or leave it out")
        elif self.tensor_parallel > 1 and gpus != self.tensor_parallel:
            raise ValueError(
                f"describe.sampler.tensor_parallel is {self.tensor_parallel}, so each sampler needs as many whole "
                f"GPUs: set cluster.samplers.gpus to {self.tensor_parallel} (it is {gpus:g})"
            )
        elif self.tensor_parallel == 1 and gpus > 1:
            raise ValueError(
                f"cluster.samplers.gpus is {gpus:g}, of which an engine without tensor parallelism uses one: set it to "
                "1, or describe.sampler.tensor_parallel to the number"
            )
        elif gpus < min(1, self.gpu_memory):
            raise ValueError(
                f"describe.sampler.gpu_memory is {self.gpu_memory:g}, more than the sampler's share of a GPU "
                f"(cluster.samplers.gpus: {gpus:g}): others on that GPU would run out of memory"
            )


class ApiSampler(Strict):
    """Sampling over the network from an OpenAI-compatible completions API, hosted or local. Without DPO only."""

    kind: Literal["api"]
    base_url: str = Field(pattern=URL, description="up to and with the version: http://localhost:8000/v1")
    model: str = Field(description="the model's name there")
    key_variable: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable that holds the key; null: no key"
    )
    seeds: bool = Field(True, description="send a seed with every request; some APIs refuse it")
    echo: bool = Field(
        False, description="the API gives log-probabilities of the prompt (vLLM's does): perplexity is measured"
    )
    concurrency: int = Field(8, ge=1, description="requests under way at a time")
    requests_per_minute: float = Field(600, gt=0)
    retries: int = Field(
        6, ge=0, description="times that a request is sent again after a 429, a 5xx or a lost connection"
    )
    timeout: float = Field(120, gt=0, description="seconds that an answer may take")
    prompt_price: float = Field(0, ge=0, description="price of a million prompt tokens, in any currency")
    completion_price: float = Field(0, ge=0, description="price of a million written tokens")

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset(
        {
            "key_variable",
            "echo",
            "concurrency",
            "requests_per_minute",
            "retries",
            "timeout",
            "prompt_price",
            "completion_price",
        }
    )

    def check(self, rounds: int, workers: int) -> None:
        """Raises ValueError where DPO rounds (`loop.rounds`) or more than one worker are asked for."""
        if rounds:
            raise ValueError(
                f"describe.sampler.kind is api and loop.rounds is {rounds}: DPO changes the model's weights, which an "
                "API keeps to itself. Set loop.rounds to 0, or describe with kind transformers or vllm"
            )
        if workers > 1:
            raise ValueError(
                f"cluster.samplers asks for {workers} workers (workers or max_workers): an API's rate limit is kept by "
                "one worker. Set it to 1 and describe.sampler.concurrency to what is wanted"
            )


Sampler = Annotated[
    TransformersSampler | VllmSampler | ApiSampler, Field(discriminator="kind"), or_of_kind("transformers")
]
