"""uvicorn's HTTP connection, with an end to its patience."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["ImpatientProtocol"]


class ImpatientProtocol(H11Protocol):
    """Drops clients that send the head of a request, or take an answer, too slowly. uvicorn waits for both for ever.

    Args:
        seconds: for a head since its first byte, or since the connection was made; and for taking more of an answer.
        options: as uvicorn gives them.
    """

    def __init__(self, seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._seconds = seconds
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._wait_for("head")

    def data_received(self, data: bytes) -> None:
        """Go on waiting, or stop where the head is complete."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("head")
        else:
            self._wait_for("head")

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._wait_for("reader")

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        self._stop("reader")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        for name in list(self._timers):
            self._stop(name)
        super().connection_lost(exc)

    def _wait_for(self, name: str) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(self._seconds, self.transport.abort)

    def _stop(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()
