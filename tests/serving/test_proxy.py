"""The gate in the proxies, around an application that only counts what it is given."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from kka_ray.config.serve import ServeConfig
from kka_ray.serving import proxy
from kka_ray.serving.access import digest
from kka_ray.serving.proxy import Gate

TOKEN = "a-token-for-the-tests"
BEARER = (b"authorization", f"Bearer {TOKEN}".encode())


def ask(
    *headers: tuple[bytes, bytes], body: int = 10, path: str = "/v1/score", expected: bytes | None = digest(TOKEN)
) -> tuple[int, dict[bytes, bytes], int, int]:
    """Status, headers, chunks of 10 bytes that were taken of an endless body, and bytes that the application got."""
    sent: list[dict[str, Any]] = []
    taken = kept = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b"x" * 10, "more_body": 10 * taken < body}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal kept
        while True:
            message = await receive()
            kept += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    scope = {"type": "http", "path": path, "headers": list(headers)}
    asyncio.run(asyncio.wait_for(Gate(app, expected, limit=100)(scope, receive, send), 20))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"], dict(sent[0]["headers"]), taken, kept


def test_the_owner_s_requests_pass() -> None:
    assert ask(BEARER, body=100) == (200, {}, 10, 100)


@pytest.mark.parametrize("headers", [[], [(b"authorization", b"Bearer another-token-for-tests")]])
def test_nothing_of_a_stranger_s_body_is_read(headers: list[tuple[bytes, bytes]]) -> None:
    status, answer, taken, _ = ask(*headers, body=10**9)
    assert (status, answer[b"connection"], taken) == (401, b"close", 0)


def test_a_body_is_cut_off_at_the_limit_wherever_it_goes() -> None:
    for path, headers in (("/v1/score", [BEARER]), ("/", [])):
        status, answer, taken, kept = ask(*headers, body=10**9, path=path)
        assert (status, answer[b"connection"], taken, kept) == (413, b"close", 11, 100)
    assert ask(BEARER, (b"content-length", b"101"), body=101)[:3:2] == (413, 0)


def test_open_routes_and_unknown_tokens_are_let_pass() -> None:
    assert ask(path="/healthz")[0] == 200
    assert ask(expected=None)[0] == 200


def test_the_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (proxy.VARIABLE, proxy.DIGEST, proxy.LIMIT):
        monkeypatch.delenv(name, raising=False)

    def settings() -> tuple[Any, Any]:
        (made,) = proxy.middlewares()
        return made.kwargs["expected"], made.kwargs["limit"]

    assert settings() == (None, ServeConfig().max_total_bytes)
    monkeypatch.setenv(proxy.VARIABLE, TOKEN)
    assert settings()[0] == digest(TOKEN)
    before = dict(os.environ)
    with proxy.installed(digest("another token of 16"), 7):
        assert settings() == (digest("another token of 16"), 7)
    assert dict(os.environ) == before
