"""The methods by name. Modules are imported when they are asked for: some need optional packages."""

from __future__ import annotations

import importlib
from typing import Any

from loracurve.errors import UserError, nearest

__all__ = ["METHODS", "ONE_MODE", "method_class", "method_name"]

METHODS: dict[str, str] = {
    "single": "loracurve.baselines.single:Single",
    "ensemble": "loracurve.baselines.ensembles:Ensemble",
    "longer_ensemble": "loracurve.baselines.ensembles:LongerEnsemble",
    "convex_mix": "loracurve.baselines.ensembles:ConvexMix",
    "temperature": "loracurve.baselines.temperature:TemperatureScaled",
    "line": "loracurve.baselines.lines:Line",
    "mc_dropout": "loracurve.baselines.mc_dropout:MCDropout",
    "swag": "loracurve.baselines.swag:SWAG",
    "laplace": "loracurve.baselines.laplace:Laplace",
    "ivon": "loracurve.baselines.ivon:IVON",
    "blob": "loracurve.baselines.blob:BLoB",
    "flat_lora": "loracurve.baselines.flat_lora:FlatLoRA",
    "curve": "loracurve.baselines.curve:Curve",
}

# Methods that train one adapter and stay around it.
ONE_MODE = ("single", "mc_dropout", "swag", "laplace", "ivon", "blob", "flat_lora")


def method_class(name: str) -> type[Any]:
    """The options of a method, a dataclass with `fit`; raises UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"method: expected one of {', '.join(METHODS)}, found {name!r}{nearest(name, METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


def method_name(method: object) -> str | None:
    """The name of a method's class; None for anything else."""
    place = f"{type(method).__module__}:{type(method).__qualname__}"
    return next((name for name, where in METHODS.items() if where == place), None)
