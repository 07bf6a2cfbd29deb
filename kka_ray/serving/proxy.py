"""A gate in Ray Serve's proxies: the token and the size of a body are checked where the body comes in.

The proxy takes a request's whole body into memory while the request waits for a free ingress process. The ingress
checks both again; by itself it would come too late for bodies that wait. Ray imports `middlewares` in each proxy where
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=kka_ray.serving.proxy:middlewares` is in the environment of its node, as
`kka serve` sees to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kka_ray.config.serve import ServeConfig
from kka_ray.serving.access import VARIABLE, digest, is_authorised
from kka_ray.serving.refusal import Refusal, too_large, unauthorised

DIGEST, LIMIT = "KKA_SERVE_TOKEN_SHA256", "KKA_SERVE_MAX_TOTAL_BYTES"
"""Environment variables with what the gate holds requests against: the token's SHA-256 in hex digits, and bytes. By
default those of `KKA_SERVE_TOKEN` and of `ServeConfig`; without any token sizes are checked alone."""

_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_GUARDED = "/v1/"


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around a proxy's own application."""
    limit = int(os.environ.get(LIMIT) or ServeConfig().max_total_bytes)
    token, hashed = os.environ.get(VARIABLE), os.environ.get(DIGEST)
    expected = bytes.fromhex(hashed) if hashed else digest(token) if token else None
    return [Middleware(Gate, expected=expected, limit=limit)]


@contextmanager
def installed(expected: bytes, limit: int) -> Iterator[None]:
    """Within the block, the proxies of a Ray cluster that is started by this process have the gate."""
    values = {_CALLBACK: f"{__name__}:{middlewares.__name__}", DIGEST: expected.hex(), LIMIT: str(limit)}
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Gate:
    """Answers 401 before a stranger's body is read, and 413 as soon as a body is larger than `limit` bytes."""

    def __init__(self, app: ASGIApp, expected: bytes | None, limit: int) -> None:
        """expected: SHA-256 of the token that requests below `/v1/` must bear; None if it is not known here."""
        self._app, self._expected, self._limit = app, expected, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        guarded = self._expected is not None and scope["path"].startswith(_GUARDED)
        if guarded and not is_authorised(headers.get("authorization"), self._expected or b""):
            await _answer(unauthorised(), {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        refusal = _answer(too_large(self._limit))
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            await refusal(scope, receive, send)
            return
        received, refused, begun = 0, False, False

        async def counted() -> Message:
            nonlocal received, refused
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit and not refused:
                refused = True
                if not begun:
                    await refusal(scope, receive, send)
            # To the application the client is gone; what it still sends is not kept.
            return {"type": "http.disconnect"} if refused else message

        async def answer(message: Message) -> None:
            nonlocal begun
            if not refused:
                begun = True
                await send(message)

        await self._app(scope, counted, answer)


def _answer(refusal: Refusal, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A refusal as the service itself words it; the connection ends, as the rest of the body is not wanted."""
    body = {"error": refusal.code, "reason": refusal.reason, "file": refusal.file}
    return JSONResponse(body, refusal.status, {"Connection": "close", **(headers or {})})
