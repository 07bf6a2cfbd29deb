"""Who may ask: a bearer token, of which the service keeps the SHA-256 only."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from kka_ray.assets import cache_dir
from kka_ray.errors import ConfigError, ResourceError
from kka_ray.places import is_uri

VARIABLE = "KKA_SERVE_TOKEN"
_LEAST = 16


def digest(token: str) -> bytes:
    """SHA-256 of a token."""
    return hashlib.sha256(token.encode()).digest()


@dataclass(frozen=True)
class Token:
    """A service's token: its SHA-256, and the token itself only where it was made here and a user has to learn it."""

    digest: bytes
    made: str | None = field(default=None, repr=False)


def make_token() -> Token:
    """The token of `$KKA_SERVE_TOKEN`, else a new one.

    Raises ConfigError if the variable holds fewer than 16 characters or other than printable ASCII.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        if len(given) < _LEAST or not given.isascii() or not given.isprintable() or " " in given:
            raise ConfigError(f"{VARIABLE} must hold at least {_LEAST} printable ASCII characters without spaces")
        return Token(digest(given))
    made = secrets.token_urlsafe(32)
    return Token(digest(made), made)


def write_token(token: Token, run: str | Path, port: int | None = None) -> Path | None:
    """Writes a token that was made to a file in the cache folder that its owner alone can read; None for others.

    The file is `serve/NAME-PORT-HASH.token`, after the name and the place of what is served, so that no other service's
    is overwritten; without the port where that is the cluster's. Raises ResourceError if it cannot be written.
    """
    if token.made is None:
        return None
    place = str(run) if is_uri(run) else str(Path(run).resolve())
    parts = (place.rstrip("/").rpartition("/")[2], port, hashlib.sha256(place.encode()).hexdigest()[:8])
    file = cache_dir() / "serve" / f"{'-'.join(str(part) for part in parts if part)}.token"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # mkstemp makes the file with mode 0600 from the start.
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w") as stream:
            stream.write(token.made + "\n")
        os.replace(temporary, file)
    except OSError as error:
        raise ResourceError(f"cannot write the token to {file}: {error}; or choose one and set {VARIABLE}") from error
    return file


def is_authorised(header: str | None, expected: bytes) -> bool:
    """Whether an Authorization header holds the token with this digest. Takes the same time wherever they differ."""
    scheme, _, given = (header or "").partition(" ")
    found = hashlib.sha256(given.strip().encode("latin-1", "replace")).digest()
    return hmac.compare_digest(found, expected) and scheme.lower() == "bearer"
