"""Waiting for an event, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SECONDS = 600
"""The last resort against a test that hangs, and nothing else: no test passes or fails by how long something takes."""


def until(condition: Callable[[], Any], what: str, alive: Callable[[], bool] = lambda: True) -> Any:
    """The value of `condition` as soon as it is true; the test fails where what it waits for ends before."""
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, f"never happened: {what}"
        if not alive():
            assert (value := condition()), f"ended before it happened: {what}"
            return value
        time.sleep(0.005)
    return value
