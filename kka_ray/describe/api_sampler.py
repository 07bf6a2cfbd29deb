"""Sampling from an OpenAI-compatible completions API: hosted models, or a server of vLLM, llama.cpp and the like.

For the zero-th iteration and for comparisons: the weights are out of reach, so there is no DPO. What it writes does not
repeat: a seed is sent with each request, and it is up to the service what it makes of it.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from kka_ray.config.models import ApiSampler, DescribeConfig
from kka_ray.describe.sampler import mixed
from kka_ray.errors import ConfigError, StageError

_log = logging.getLogger(__name__)
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_OF_THE_PROMPT = (400, 403, 413, 422, 451)
"""Statuses by which a service refuses what it was sent, rather than who sends it or where to."""
T = TypeVar("T")


class RefusedPromptError(Exception):
    """The service will not have a prompt. No error that ends a run: the prompt is looked for and left out."""


class RateLimit:
    """Lets one caller through every `60 / per_minute` seconds; the others wait their turn. Safe for threads."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._gap = 60 / per_minute
        self._clock = clock
        self._next = clock()
        self._lock = threading.Lock()

    def reserve(self) -> float:
        """Takes the next turn and returns the seconds until it."""
        with self._lock:
            now = self._clock()
            turn = max(self._next, now)
            self._next = turn + self._gap
            return turn - now


class ApiEngine:
    """A client of a completions API. See `kka_ray.describe.sampler.Sampler`.

    The key is read from the environment variable that the configuration names, here and nowhere else: it is in no
    file, no message and no key of the store. `sleep` is what waits, in seconds.
    """

    def __init__(self, config: DescribeConfig, sleep: Callable[[float], None] = time.sleep) -> None:
        engine = config.sampler
        if not isinstance(engine, ApiSampler):
            raise TypeError(f"expected an api sampler, got {engine.kind}")
        self.config, self.engine = config, engine
        self._wait = sleep
        self._limit = RateLimit(engine.requests_per_minute)
        self._usage: Counter[str] = Counter()
        self._lock = threading.Lock()
        headers = {"Authorization": f"Bearer {_key(engine.key_variable)}"} if engine.key_variable else {}
        self._client = httpx2.Client(headers=headers, timeout=engine.timeout)

    def load_adapter(self, folder: Path | None) -> None:
        """Raises StageError for any adapter: the model's weights are the service's."""
        if folder is not None:
            raise StageError(f"an API cannot load the adapter {folder}")

    def sample(self, prompts: Sequence[str], count: int, seed: int) -> list[list[str]]:
        """`count` completions for each prompt: a request a prompt, `concurrency` of them at a time."""

        def ask(number: int, prompt: str) -> list[str]:
            body = {
                "prompt": prompt,
                "n": count,
                "max_tokens": self.config.max_tokens,
                "temperature": self.config.temperature,
                "top_p": self.config.top_p,
                "stop": ["\n"],
            }
            if self.engine.seeds:
                body["seed"] = mixed(seed, number) % 2**31
            choices = self._request(body, count)
            return [c["text"] + ("\n" if c.get("finish_reason") == "stop" else "") for c in choices]

        return self._at_once(ask, prompts)

    def log_probs(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[float]]:
        """Log-probabilities by an `echo` of prompt and completion; a token across their border counts to the prompt."""

        def ask(number: int, prompt: str) -> list[float]:
            body = {"prompt": prompt + completions[number], "max_tokens": 0, "echo": True, "logprobs": 0}
            found = self._request(body, 1)[0].get("logprobs")
            if not found:
                raise StageError(
                    f"{self.engine.base_url} gives no log-probabilities of a prompt: set describe.sampler.echo to false"
                )
            offsets, values = found["text_offset"], found["token_logprobs"]
            return [v for o, v in zip(offsets, values, strict=True) if o >= len(prompt) and v is not None]

        return self._at_once(ask, prompts)

    def take_usage(self) -> dict[str, int]:
        """Requests, retries, prompt_tokens and completion_tokens since the last call."""
        with self._lock:
            taken, self._usage = dict(self._usage), Counter()
        return taken

    def sleep(self) -> None:
        """Nothing to give back."""

    def _at_once(self, ask: Callable[[int, str], T], prompts: Sequence[str]) -> list[T]:
        with ThreadPoolExecutor(self.engine.concurrency) as pool:
            futures = [pool.submit(ask, number, prompt) for number, prompt in enumerate(prompts)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                # Requests that were not sent yet would cost money for an answer that nobody reads.
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _request(self, body: dict[str, Any], count: int) -> list[dict[str, Any]]:
        """The choices of an answer, in their order. Raises StageError for one that is not as it should be."""
        answer = self._send({"model": self.engine.model, **body})
        choices, usage = answer.get("choices"), answer.get("usage")
        if (
            not isinstance(choices, list)
            or len(choices) != count
            or not all(isinstance(c, dict) and isinstance(c.get("text"), str) for c in choices)
            or not isinstance(usage, dict)
        ):
            raise StageError(
                f"{self.engine.base_url} answered without `usage`, without a `text` in each of its `choices`, or with "
                f"another number of them than the {count} that were asked for: it is no OpenAI-compatible completions "
                "API (one of chats has another address)"
            )
        with self._lock:
            for name in ("prompt_tokens", "completion_tokens"):
                self._usage[name] += int(usage.get(name) or 0)
        return sorted(choices, key=lambda c: c.get("index", 0))

    def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        """Posts a request, again after a while where the service is busy or the connection was lost.

        Raises RefusedPromptError for a prompt that the service refuses, StageError where it refuses all or fails.
        """
        url = f"{self.engine.base_url.rstrip('/')}/completions"
        for attempt in range(self.engine.retries + 1):
            self._wait(self._limit.reserve())
            self._count("requests" if attempt == 0 else "retries")
            asked: str | None = None
            try:
                response = self._client.post(url, json=body)
            except httpx2.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return _answer(url, response)
                trouble = f"HTTP {response.status_code}: {response.text[:300]}"
                if response.status_code in _OF_THE_PROMPT:
                    raise RefusedPromptError(f"{url} refused a prompt: {trouble}")
                if response.status_code != 429 and response.status_code < 500:
                    raise StageError(f"{url} refused a request: {trouble}")
                asked = response.headers.get("retry-after")
            if attempt < self.engine.retries:
                pause = _pause(attempt, asked)
                _log.warning("%s: %s; again in %.1f s", url, trouble, pause)
                self._wait(pause)
        raise StageError(
            f"{url} failed {self.engine.retries + 1} times, the last time with {trouble}. What was written is kept: "
            "run the same command again later, or raise describe.sampler.retries or lower requests_per_minute"
        )

    def _count(self, name: str) -> None:
        with self._lock:
            self._usage[name] += 1


def cost(usage: dict[str, int], sampler: ApiSampler) -> float:
    """Price of the tokens of a usage, in the currency of the configured prices."""
    prompt = usage.get("prompt_tokens", 0) * sampler.prompt_price
    return (prompt + usage.get("completion_tokens", 0) * sampler.completion_price) / 1e6


def _answer(url: str, response: httpx2.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError as error:
        raise StageError(f"{url} answered with what is no JSON: {response.text[:100]!r}") from error
    if not isinstance(answer, dict):
        raise StageError(f"{url} answered with a JSON that is no object: {response.text[:100]!r}")
    return answer


def _pause(attempt: int, asked: str | None) -> float:
    """Seconds until the next attempt: what the service asked for, else doubled each time, with jitter."""
    if asked is not None and re.fullmatch(r"[0-9]+(\.[0-9]+)?", asked):
        return min(float(asked), _LONGEST_WAIT)
    return min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1)


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()  # a secret that comes from a file often ends in a line break
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{variable} (describe.sampler.key_variable) holds what no key has, such as a line break")
    if not key:
        raise ConfigError(
            f"describe.sampler.key_variable names {variable}, which is not set where the sampler runs: export it "
            "before the cluster is started"
        )
    return key
