"""The body of an error: one line, in the object that the clients of a path know."""

from __future__ import annotations

from typing import Any

__all__ = ["OPENAI", "failure_of"]


OPENAI = "/v1/"
"""How the paths begin that speak as OpenAI's API does."""

_KINDS = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error", 500: "server_error"}


def failure_of(path: str, status: int, message: str) -> tuple[int, dict[str, Any]]:
    """Status and body of a refusal. OpenAI's API says 400 of what is wrong in a body, whatever it is."""
    if not path.startswith(OPENAI):
        return status, {"error": message}
    status = 400 if status == 422 else status
    kind = _KINDS.get(status, "invalid_request_error")
    return status, {"error": {"message": message, "type": kind, "param": None, "code": None}}
