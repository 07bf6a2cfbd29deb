"""A small HTTP server that answers as an OpenAI-compatible completions API does, and fails when told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Service:
    """What the server was asked, and what it answers: `failures` first, one a request, then completions.

    `refused` has the status for a prompt that is always refused.
    """

    url: str = ""
    failures: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    body: dict[str, Any] | None = None
    lines: list[str] = field(default_factory=list)
    """What it writes, one after the other and over again; by default the prompt's last word and a number."""


@contextmanager
def completions_server() -> Iterator[Service]:
    """The server on a free port of localhost, for as long as the block lasts."""
    service, lock = Service(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                service.asked.append(body)
                service.keys.append(self.headers.get("Authorization"))
                usual = (service.refused.get(body["prompt"], 200), {})
                status, headers = service.failures.pop(0) if service.failures else usual
                answer = service.body or _completion(body, service.lines)
            content = json.dumps(answer if status == 200 else {"error": "not now"}).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _completion(body: dict[str, Any], lines: list[str]) -> dict[str, Any]:
    count, words = body.get("n", 1), body["prompt"].split()
    texts = [f" {words[-1]} {k}" for k in range(count)]
    if lines:
        texts = [f" {lines[k % len(lines)]}" for k in range(count)]
        lines[:] = lines[count:] + lines[:count]
    # In the wrong order: a client must go by `index`.
    choices: list[dict[str, Any]] = [
        {"index": k, "text": texts[k], "finish_reason": "length" if k else "stop", "logprobs": None}
        for k in reversed(range(count))
    ]
    if body.get("echo"):
        offsets = [i for i, c in enumerate(body["prompt"]) if i == 0 or c == " "]
        values = [None, *(-float(i) for i in range(1, len(offsets)))]
        choices[0]["logprobs"] = {"text_offset": offsets, "token_logprobs": values}
    written = 0 if body.get("echo") else 3 * count
    return {"choices": choices, "usage": {"prompt_tokens": len(words), "completion_tokens": written}}
