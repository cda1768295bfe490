"""Options that the library had once: files that hold their defaults stay readable, anything else is refused.

What was found with them stands in results/NOTES.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from loracurve.system.errors import UserError

__all__ = ["DEFAULTS", "LAST_COMMIT", "MADE_FASTER", "Part", "refusal", "split_retired"]

logger = logging.getLogger("loracurve")

LAST_COMMIT = "94813ef"
"""The last commit that has them."""

Part = Literal["curve", "training"]

DEFAULTS: dict[Part, dict[str, Any]] = {
    "curve": {"smooth": False},
    "training": {"bootstrap": {"kind": "none", "length_scale": 0.25, "features": 64}},
}
"""Options that are gone, of a curve's shape and of its training, with the defaults that files hold."""

MADE_FASTER = {"compile": False}
"""Those of any training that changed nothing but the time of a step, with their defaults: any value is dropped."""


def split_retired(part: Part, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that are still there, and those that ask for what is gone (defaults of these are dropped)."""
    here: dict[str, Any] = {}
    gone: dict[str, Any] = {}
    for name, value in options.items():
        if part == "training" and name in MADE_FASTER:
            if value != MADE_FASTER[name]:
                logger.warning("%s: left out, steps are as fast without it now", name)
        elif name in DEFAULTS[part]:
            default = DEFAULTS[part][name]
            off = value.get("kind", "none") == "none" if isinstance(value, Mapping) else value == default
            gone |= {} if off else {name: value}
        elif part == "training" and _is_gone(name, value):
            gone[name] = value
        else:
            here[name] = value
    return here, gone


def _is_gone(name: str, value: Any) -> bool:
    """Values that are gone of options that are still there."""
    mixture = name == "objective" and isinstance(value, Mapping) and value.get("jsd") == "mixture"
    return mixture or (name == "sampling" and value == "quasi-random")


def refusal(names: str) -> UserError:
    """What is said to somebody who asks for retired options."""
    return UserError(
        f"{names}: expected none, it did not help (results/NOTES.md) and is no longer in the library; commit "
        f"{LAST_COMMIT} still has it"
    )
