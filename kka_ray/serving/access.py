"""Who may ask: a bearer token, of which the service keeps the SHA-256 only."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

from kka_ray.assets import cache_dir
from kka_ray.errors import ConfigError, ResourceError

VARIABLE = "KKA_SERVE_TOKEN"
_LEAST = 16


def digest(token: str) -> bytes:
    """SHA-256 of a token."""
    return hashlib.sha256(token.encode()).digest()


def make_digest(run: str | Path) -> tuple[bytes, Path | None]:
    """The digest of the service's token, and the file that a generated token was written to.

    The token is `$KKA_SERVE_TOKEN`. Without it a new one is written to `serve/RUN.token` in the cache folder, readable
    by its owner only. Raises ConfigError if the variable holds fewer than 16 characters or other than printable
    ASCII, ResourceError if the file cannot be written.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        if len(given) < _LEAST or not given.isascii() or not given.isprintable() or " " in given:
            raise ConfigError(f"{VARIABLE} must hold at least {_LEAST} printable ASCII characters without spaces")
        return digest(given), None
    token = secrets.token_urlsafe(32)
    file = cache_dir() / "serve" / f"{Path(run).resolve().name}.token"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # mkstemp makes the file with mode 0600 from the start.
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w") as stream:
            stream.write(token + "\n")
        os.replace(temporary, file)
    except OSError as error:
        raise ResourceError(f"cannot write the token to {file}: {error}; or choose one and set {VARIABLE}") from error
    return digest(token), file


def is_authorised(header: str | None, expected: bytes) -> bool:
    """Whether an Authorization header holds the token with this digest. Takes the same time wherever they differ."""
    scheme, _, given = (header or "").partition(" ")
    found = hashlib.sha256(given.strip().encode("latin-1", "replace")).digest()
    return hmac.compare_digest(found, expected) and scheme.lower() == "bearer"
