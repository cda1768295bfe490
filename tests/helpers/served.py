"""Texts, rows and limits of the served run, and a server in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from helpers.waiting import SECONDS
from loracurve.runs.run import Run
from loracurve.serving.config import ServeConfig

TEXTS = ["the film is good", "a truly awful", "it was fine", "quite dull", "i found the music lovely", "poor " * 30]
ROWS = [{"id": f"r{i}", "text": text} for i, text in enumerate(TEXTS)]
LIMITS = ServeConfig(max_body_bytes=20_000, max_rows=8, max_tokens_per_row=100, max_new_tokens=6)
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}answer :"
"""A chat template."""


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Predictions are equal up to the rounding of another batch."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == (pytest.approx(value, abs=3e-6) if isinstance(value, float) else value) or (
                name == "probs" and one[name] == pytest.approx(value, abs=3e-6)
            )


@contextmanager
def served(run: Run, options: ServeConfig, token: str | None = None) -> Iterator[str]:
    """The address of a run served from a thread."""
    import uvicorn

    from loracurve.serving.app import make_app

    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = make_app(run, options, token=token)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", lifespan="on"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(SECONDS)
