"""Why a request is not answered with scores."""

from __future__ import annotations


class Refusal(Exception):
    """A refused request: HTTP status, a short code for programs, a reason for people, the file to blame if any."""

    def __init__(self, status: int, code: str, reason: str, file: str | None = None) -> None:
        super().__init__(reason)
        self.status, self.code, self.reason, self.file = status, code, reason, file


def unauthorised() -> Refusal:
    """A request without the token."""
    return Refusal(401, "unauthorised", "send the service's token: Authorization: Bearer TOKEN")


def too_large(limit: int) -> Refusal:
    """A body of more than `limit` bytes."""
    return Refusal(413, "request_too_large", f"the request is larger than {limit} bytes")
