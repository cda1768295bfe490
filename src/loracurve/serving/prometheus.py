"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Figures"]


class Figures:
    """Counters of one server. `waiting` and `rows` give the length of the queue in requests and in rows; paths other
    than `paths` are one label."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, paths: frozenset[str], waiting: Callable[[], int], rows: Callable[[], int]) -> None:
        self.registry, self.paths = CollectorRegistry(), paths
        known: dict[str, Any] = {"registry": self.registry, "namespace": "loracurve"}
        self.requests = Counter("requests", "Requests by path and status.", ("path", "status"), **known)
        self.errors = Counter("errors", "Requests with a status of 400 or more.", ("path",), **known)
        self.seconds = Histogram(
            "request_seconds",
            "From the head of a request to the end of its answer.",
            ("path",),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            **known,
        )
        self.together = Histogram(
            "batch_requests", "Requests that ran together.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **known
        )
        self.tokens = Counter("tokens", "Tokens of rows and prompts read, and tokens generated.", ("kind",), **known)
        Gauge("queue_length", "Requests that wait.", **known).set_function(waiting)
        Gauge("queue_rows", "Rows and prompts that wait.", **known).set_function(rows)

    def finished(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        path = path if path in self.paths else "other"
        self.requests.labels(path, str(status)).inc()
        if status >= 400:
            self.errors.labels(path).inc()
        self.seconds.labels(path).observe(seconds)

    def count(self, kind: str, tokens: int) -> None:
        """Count tokens, `read` or `generated`."""
        self.tokens.labels(kind).inc(tokens)

    def text(self) -> bytes:
        """All figures as Prometheus reads them."""
        return generate_latest(self.registry)
