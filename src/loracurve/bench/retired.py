"""Curves of suites that name retired options: their stored results stay readable, running them is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from loracurve.baselines.curve import Curve
from loracurve.baselines.method import Setting
from loracurve.curve.retired import DEFAULTS, MADE_FASTER, Part, refusal, split_retired

__all__ = ["RetiredCurve", "merged", "of_results", "with_defaults", "without_retired"]


@dataclass(frozen=True)
class RetiredCurve(Curve):
    """A curve with options that the library no longer has."""

    retired: dict[Part, dict[str, Any]] = field(default_factory=dict)
    """those of its shape (`curve`) and of its training (`training`)"""

    @property
    def present(self) -> Curve:
        """The curve without them."""
        return Curve(**{f.name: getattr(self, f.name) for f in fields(Curve)})

    @property
    def in_full(self) -> dict[str, Any]:
        """`retired` with what was not said at its default."""
        named = {p: {n: d for n, d in DEFAULTS[p].items() if n in found} for p, found in self.retired.items()}
        return merged(named, self.retired)

    @property
    def own_anchors(self) -> bool:
        """Whether its anchors were trained for it alone: with the weights of a bootstrap everywhere on the curve."""
        kind: Any = self.retired.get("training", {}).get("bootstrap", {}).get("kind")
        return bool(kind == "everywhere")

    def fit(self, setting: Setting) -> NoReturn:
        """Raises UserError."""
        raise refusal(", ".join(f"{part}.{name}" for part, found in self.retired.items() for name in found))


def without_retired(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Part, dict[str, Any]]]:
    """The options of a curve of a suite, and apart from them those that are retired, by part."""
    here = dict(options)
    gone: dict[Part, dict[str, Any]] = {}
    for part in DEFAULTS:
        if isinstance(here.get(part), Mapping):
            here[part], found = split_retired(part, here[part])
            gone |= {part: found} if found else {}
    return here, gone


def with_defaults(options: Any) -> Any:
    """Recorded or spelt-out options with the defaults of retired ones in every curve, its own or inside a method."""
    if not isinstance(options, Mapping):
        return options
    found = {name: with_defaults(value) for name, value in options.items()}
    return merged(DEFAULTS, found) if found.get("method") == "curve" else found


def of_results(recorded: Any) -> Any:
    """Recorded options without retired ones that decided nothing but the time of a step, at their defaults."""
    if not isinstance(recorded, Mapping):
        return recorded
    return {n: of_results(v) for n, v in recorded.items() if n not in MADE_FASTER or v != MADE_FASTER[n]}


def merged(first: Mapping[Any, Any], second: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested mappings, of which the second decides."""
    out = dict(first)
    for name, value in second.items():
        both = isinstance(value, Mapping) and isinstance(out.get(name), Mapping)
        out[name] = merged(out[name], value) if both else value
    return out
