"""The single adapters among a run's methods: what to expect of one, and the one that validation rows choose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["chosen_adapter", "chosen_name", "mean_name", "single_adapters"]


def single_adapters(methods: Mapping[str, Any]) -> list[str]:
    """Their names among methods of metrics.json."""
    return [name for name in methods if re.fullmatch(r"adapter \d+", name)]


def chosen_adapter(methods: Mapping[str, Any]) -> str | None:
    """The one of lowest NLL on validation rows; None where there are none, or their NLL was not recorded."""
    nll = {name: methods[name].get("tempered", {}).get("validation_nll") for name in single_adapters(methods)}
    if not nll or None in nll.values():
        return None
    return min(nll, key=lambda name: float(nll[name]))


def mean_name(count: int) -> str:
    """What the mean of so many single adapters' figures is called."""
    return f"single adapter (mean of {count})"


def chosen_name(adapter: str) -> str:
    """What the chosen adapter is called."""
    return f"{adapter} (best on validation)"
