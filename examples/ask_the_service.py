"""Asks a running service, with the token in KKA_SERVE_TOKEN: `python examples/ask_the_service.py a.png b.jpg`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import requests


def main(*files: str, url: str = "http://127.0.0.1:8000") -> None:
    """Prints a line a file, or why the request was refused (docs/serving.md lists the codes)."""
    images = [("images", (Path(file).name, Path(file).read_bytes())) for file in files]
    bearer = {"Authorization": f"Bearer {os.environ['KKA_SERVE_TOKEN']}"}
    reply = requests.post(f"{url}/v1/score", files=images, headers=bearer, timeout=120)
    if reply.status_code != requests.codes.ok:
        sys.exit(f"refused with status {reply.status_code}: {reply.text}")
    for image in reply.json()["images"]:
        print(f"{image['file']}: {image['verdict']}, score {image['score']:.3f}, threshold {image['threshold']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
