from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from kka_ray.config.models import ApiSampler, DescribeConfig
from kka_ray.describe.api_sampler import _FIRST_WAIT, ApiEngine, RateLimit, RefusedPromptError, _pause, cost
from kka_ray.errors import ConfigError, KkaError, StageError
from tests.describe.completions_server import Service, completions_server


@pytest.fixture
def service() -> Iterator[Service]:
    with completions_server() as service:
        yield service


def engine(service: Service, waits: list[float] | None = None, **options: Any) -> ApiEngine:
    sampler = ApiSampler(kind="api", base_url=service.url, model="m", requests_per_minute=1e9, **options)
    return ApiEngine(
        DescribeConfig(sampler=sampler, max_tokens=7, top_p=0.9), sleep=([] if waits is None else waits).append
    )


def test_lines_come_back_with_their_prompts_and_in_their_order(service: Service) -> None:
    written = engine(service, concurrency=4).sample(["one", "two", "three"], 2, seed=5)
    assert written == [[" one 0\n", " one 1"], [" two 0\n", " two 1"], [" three 0\n", " three 1"]]
    first = next(body for body in service.asked if body["prompt"] == "one")
    assert (first["model"], first["n"], first["max_tokens"], first["top_p"], first["stop"]) == ("m", 2, 7, 0.9, ["\n"])
    assert len({body["seed"] for body in service.asked}) == 3


def test_tokens_are_counted_once_and_priced(service: Service) -> None:
    sampler = engine(service, prompt_price=1.0, completion_price=10.0)
    sampler.sample(["a b c d", "e"], 2, seed=0)
    usage = sampler.take_usage()
    assert usage == {"requests": 2, "prompt_tokens": 5, "completion_tokens": 12}
    assert cost(usage, sampler.engine) == pytest.approx((5 * 1 + 12 * 10) / 1e6)
    assert sampler.take_usage() == {}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_asked_again_after_longer_and_longer_pauses(service: Service, status: int) -> None:
    service.failures = [(status, {})] * 3
    waits: list[float] = []
    sampler = engine(service, waits)
    assert sampler.sample(["x"], 1, seed=0) == [[" x 0\n"]]
    assert sampler.take_usage()["retries"] == 3
    pauses = [w for w in waits if w > 0.1]
    assert len(pauses) == 3
    assert all(2**k / 2 <= pause <= 2**k for k, pause in enumerate(pauses))


def test_the_service_says_how_long_to_wait(service: Service) -> None:
    service.failures = [(429, {"Retry-After": "17"})]
    waits: list[float] = []
    engine(service, waits).sample(["x"], 1, seed=0)
    assert 17.0 in waits


def test_a_service_that_stays_busy_ends_with_what_it_said(service: Service) -> None:
    service.failures = [(503, {})] * 3
    with pytest.raises(StageError, match=r"(?s)failed 3 times.*HTTP 503.*not now"):
        engine(service, retries=2).sample(["x"], 1, seed=0)


def test_a_service_that_is_not_there_is_named() -> None:
    with completions_server() as service:
        pass
    with pytest.raises(StageError, match=r"127\.0\.0\.1.*ConnectError"):
        engine(service, retries=1).sample(["x"], 1, seed=0)


@pytest.mark.parametrize("status", [401, 402, 404, 405])
def test_a_request_that_is_refused_is_not_sent_again(service: Service, status: int) -> None:
    service.failures = [(status, {})]
    with pytest.raises(StageError, match=f"HTTP {status}"):
        engine(service).sample(["x"], 1, seed=0)
    assert len(service.asked) == 1


@pytest.mark.parametrize("status", [400, 403, 413, 422, 451])
def test_a_prompt_that_is_refused_is_an_error_of_its_chunk_and_not_of_the_run(service: Service, status: int) -> None:
    service.refused = {"bad": status}
    sampler = engine(service)
    with pytest.raises(RefusedPromptError, match=f"refused a prompt: HTTP {status}") as error:
        sampler.sample(["good", "bad"], 1, seed=0)
    assert not isinstance(error.value, KkaError), "such errors end the run, and others are searched for their row"
    assert sampler.sample(["good"], 1, seed=0) == [[" good 0\n"]]
    assert sum(body["prompt"] == "bad" for body in service.asked) == 1


@pytest.mark.parametrize(
    "body", [{"choices": []}, {"choices": [], "usage": {}}, {"id": 3}, {"choices": [{"message": {}}], "usage": {}}]
)
def test_an_answer_of_another_kind_is_refused(service: Service, body: dict[str, Any]) -> None:
    service.body = body
    with pytest.raises(StageError, match="no OpenAI-compatible completions API"):
        engine(service).sample(["x"], 1, seed=0)


def test_the_key_is_sent_and_shown_nowhere(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SOME_KEY", "secret-123")
    service.failures = [(503, {}), (401, {})]
    sampler = engine(service, key_variable="SOME_KEY")
    with pytest.raises(StageError) as error:
        sampler.sample(["x"], 1, seed=0)
    assert service.keys == ["Bearer secret-123"] * 2
    assert "secret-123" not in caplog.text + str(error.value) + sampler.config.model_dump_json() + repr(vars(sampler))


def test_a_key_that_is_not_set_is_named(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="SOME_KEY"):
        engine(service, key_variable="SOME_KEY")


def test_log_probabilities_are_those_behind_the_prompt(service: Service) -> None:
    assert engine(service, echo=True).log_probs(["a b", "a"], [" c d", " e"]) == [[-2.0, -3.0], [-1.0]]
    assert all(body["echo"] and body["max_tokens"] == 0 for body in service.asked)


def test_turns_are_given_at_the_wanted_rate() -> None:
    now = [0.0]
    limit = RateLimit(120, clock=lambda: now[0])
    assert [limit.reserve() for _ in range(3)] == pytest.approx([0, 0.5, 1])
    now[0] = 10.0
    assert [limit.reserve() for _ in range(2)] == pytest.approx([0, 0.5])


def test_a_key_with_a_line_break_is_mended_or_refused_without_being_shown(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret\n")
    assert engine(service, key_variable="SOME_KEY")._client.headers["authorization"] == "Bearer sk-secret"
    monkeypatch.setenv("SOME_KEY", "sk-secret\nmore")
    with pytest.raises(ConfigError, match="SOME_KEY") as raised:
        engine(service, key_variable="SOME_KEY")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("asked", "seconds"), [("7", 7.0), ("0.5", 0.5)])
def test_the_pause_that_a_service_asks_for_is_kept(asked: str, seconds: float) -> None:
    assert _pause(0, asked) == seconds


@pytest.mark.parametrize("asked", [None, "", "soon", "\u00b2", "Wed, 21 Oct 2026 07:28:00 GMT", "1.2.3", "."])
def test_without_a_number_of_seconds_the_pause_is_our_own(asked: str | None) -> None:
    assert 0 < _pause(0, asked) <= _FIRST_WAIT
