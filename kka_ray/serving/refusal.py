"""Why a request is not answered with scores."""

from __future__ import annotations


class Refusal(Exception):
    """A refused request: HTTP status, a short code for programs, a reason for people, the file to blame if any."""

    def __init__(self, status: int, code: str, reason: str, file: str | None = None) -> None:
        super().__init__(reason)
        self.status, self.code, self.reason, self.file = status, code, reason, file
