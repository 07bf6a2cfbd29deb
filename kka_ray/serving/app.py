"""The service's HTTP interface as a plain ASGI app: it knows nothing of Ray, and asks a `Scorer` for judgements."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kka_ray.config.serve import ServeConfig
from kka_ray.scoring import verdict
from kka_ray.serving.access import is_authorised
from kka_ray.serving.refusal import Refusal, unauthorised
from kka_ray.serving.scorer import Item, Judgement, Unreadable
from kka_ray.serving.upload import check_image, read_images

_READY_SECONDS = 5


class Scorer(Protocol):
    """What judges images: detector replicas, or one detector in this process."""

    async def score(self, items: Sequence[Item]) -> list[Judgement | Unreadable]:
        """A judgement for each image, in order. Raises Refusal if it is not to be had now."""

    async def describe(self) -> dict[str, Any]:
        """What is served."""


class ImageScore(BaseModel):
    """One image's scores."""

    file: str
    score: float = Field(description="higher is more anomalous, in the detector's own unit")
    robust_z: float = Field(description="median absolute deviations above the median of validation normals")
    percentile: float = Field(description="0 to 100, place among the scores of validation normals")
    verdict: str = Field(description="normal, or anomalous: the score exceeds the threshold")
    threshold: float
    heatmap: str | None = Field(None, description="base64 of a PNG: the image with its anomalous places marked")


class ScoreReply(BaseModel):
    """Scores of all images of a request, in its order."""

    images: list[ImageScore]


class ErrorReply(BaseModel):
    """Why there are no scores. A request is refused as a whole."""

    error: str = Field(description="a short code")
    reason: str
    file: str | None = Field(None, description="the file that is to blame")


_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
            }
        }
    },
}
_BEARER = HTTPBearer(auto_error=False, description="the service's token")
"""Declares the token in `/openapi.json`; it refuses nothing by itself."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 408, 413, 415, 422, 503)
}


def create_app(scorer: Scorer, config: ServeConfig, token_digest: bytes) -> FastAPI:
    """The app. `token_digest` is the SHA-256 of the token that requests to `/v1` must bear.

    The page, the health routes and `/openapi.json` answer without: they tell nothing of the model.
    """
    # No redirect from a path that ends with a slash: its address would be http:// behind a proxy with TLS.
    app = FastAPI(title="kka_ray", docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_error_handlers(app)

    app.add_middleware(_Hardened)

    # A dependency runs before query and body are looked at: strangers learn nothing from validation errors.
    async def authorised(request: Request) -> None:
        if not is_authorised(request.headers.get("authorization"), token_digest):
            raise unauthorised()

    @app.post(
        "/v1/score",
        dependencies=[Depends(_BEARER), Depends(authorised)],
        responses=_ERRORS,
        openapi_extra={"requestBody": _BODY},
    )
    async def score(
        request: Request, heatmap: Annotated[bool, Query(description="add a heat map to each image")] = False
    ) -> ScoreReply:
        """Scores 1 to N images."""
        end = asyncio.get_running_loop().time() + config.timeout
        files = await _receive(request, config, end)
        async with _answered(config, end):
            for name, content in files:
                # In a thread, as reading the header of a strange file may take a while.
                await asyncio.to_thread(check_image, content, name, config)
            items = [Item(name, content, heatmap) for name, content in files]
            judged = await scorer.score(items)
        return ScoreReply(images=[_reply(item.name, found) for item, found in zip(items, judged, strict=True)])

    @app.get(
        "/v1/model",
        dependencies=[Depends(_BEARER), Depends(authorised)],
        responses={status: _ERRORS[status] for status in (401, 503)},
    )
    async def model() -> dict[str, Any]:
        """The detector, its threshold and its backbone."""
        async with _answered(config, asyncio.get_running_loop().time() + config.timeout):
            return await scorer.describe()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": ErrorReply}})
    async def readyz() -> dict[str, str]:
        """Whether a detector answers."""
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await scorer.describe()
        except TimeoutError as error:
            raise Refusal(503, "not_ready", "no detector answers yet") from error
        return {"status": "ready"}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        """A page to drop an image on."""
        html, policy = _page()
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    return app


class _Hardened:
    """Adds headers by which browsers neither guess types nor keep replies."""

    _HEADERS = (
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-store"),
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._HEADERS]}
            await send(message)

        await self._app(scope, receive, add)


@asynccontextmanager
async def _answered(config: ServeConfig, end: float) -> AsyncIterator[None]:
    """Gives the block up at `end`, on the clock of the event loop: a request's `timeout` after its beginning."""
    try:
        async with asyncio.timeout_at(end):
            yield
    except TimeoutError as error:
        raise Refusal(503, "too_slow", f"no answer within {config.timeout:g} s; try again later") from error


async def _receive(request: Request, config: ServeConfig, end: float) -> list[tuple[str, bytes]]:
    headers = request.headers
    try:
        async with asyncio.timeout_at(end):
            return await read_images(
                headers.get("content-type"), headers.get("content-length"), request.stream(), config
            )
    except TimeoutError as error:
        raise Refusal(408, "too_slow", f"the request did not arrive within {config.timeout:g} s") from error
    except ClientDisconnect as error:
        raise Refusal(400, "disconnected", "the client went away") from error


def _reply(name: str, found: Judgement | Unreadable) -> ImageScore:
    if isinstance(found, Unreadable):
        if found.too_large:
            raise Refusal(413, "too_many_pixels", found.reason, name)
        raise Refusal(400, "corrupt_image", found.reason, name)
    return ImageScore(
        file=name,
        score=found.score,
        robust_z=found.robust_z,
        percentile=found.percentile,
        verdict=verdict(found.anomalous),
        threshold=found.threshold,
        heatmap=base64.b64encode(found.heatmap).decode() if found.heatmap is not None else None,
    )


def _add_error_handlers(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal)
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return _error(error.status, error.code, error.reason, error.file, headers)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        reasons = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
        return _error(422, "invalid", "; ".join(reasons))

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, "http", str(error.detail), headers=dict(error.headers or {}))

    async def failed(_: Request, error: Exception) -> JSONResponse:
        # The traceback goes to the log of the server, which raises the error again.
        return _error(500, "internal", "the service failed; its log says why")

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)


def _error(
    status: int, code: str, reason: str, file: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(ErrorReply(error=code, reason=reason, file=file).model_dump(), status, headers)


@lru_cache(maxsize=1)
def _page() -> tuple[str, str]:
    """The page, and a policy under which a browser runs nothing but the page's own script and styles."""
    html = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        found = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert found is not None, f"page.html has no {tag}"
        hashes[tag] = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy
