"""Samplers: what writes the descriptions. All have the one interface `Sampler`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kka_ray.config.models import DescribeConfig, TransformersSampler
from kka_ray.errors import ConfigError


class Sampler(Protocol):
    """A language model that completes few-shot prompts, one line a sample."""

    identity: str
    """Changes whenever the base weights or the dtype do."""

    def load_adapter(self, folder: Path | None) -> None:
        """Makes the policy that of a LoRA adapter on the raw base model; None is the base model itself."""

    def sample(self, prompts: Sequence[str], count: int, seed: int) -> list[list[str]]:
        """`count` completions for each prompt, up to and with the line's end where one was written."""

    def log_probs(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[float]]:
        """For each pair, the natural-log probability of each token of the completion under the present policy."""


def build_sampler(config: DescribeConfig, device: str = "cpu") -> Sampler:
    """The sampler that a configuration names."""
    if isinstance(config.sampler, TransformersSampler):
        from kka_ray.describe.transformers_sampler import TransformersEngine

        return TransformersEngine(config, device)
    raise ConfigError(
        f"describe.sampler.kind={config.sampler.kind} is not available in this version; use kind: transformers"
    )
