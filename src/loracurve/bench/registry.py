"""The methods by name."""

from __future__ import annotations

from typing import Any

from loracurve.baselines.blob import BLoB
from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import ConvexMix, Ensemble, LongerEnsemble
from loracurve.baselines.flat_lora import FlatLoRA
from loracurve.baselines.ivon import IVON
from loracurve.baselines.laplace import Laplace
from loracurve.baselines.lines import Line
from loracurve.baselines.mc_dropout import MCDropout
from loracurve.baselines.single import Single
from loracurve.baselines.sngp import SNGP
from loracurve.baselines.swag import SWAG, MultiSWAG
from loracurve.baselines.temperature import TemperatureScaled
from loracurve.baselines.unknowns import FamiliarityOf, LaplaceCurve
from loracurve.system.errors import UserError, nearest

__all__ = ["METHODS", "ONE_MODE", "method_class", "method_name"]


METHODS: dict[str, type[Any]] = {
    "single": Single,
    "ensemble": Ensemble,
    "longer_ensemble": LongerEnsemble,
    "convex_mix": ConvexMix,
    "temperature": TemperatureScaled,
    "line": Line,
    "mc_dropout": MCDropout,
    "swag": SWAG,
    "multiswag": MultiSWAG,
    "laplace": Laplace,
    "ivon": IVON,
    "blob": BLoB,
    "flat_lora": FlatLoRA,
    "curve": Curve,
    "laplace_curve": LaplaceCurve,
    "familiarity": FamiliarityOf,
    "sngp": SNGP,
}

# Methods that train one adapter and stay around it.
ONE_MODE = ("single", "mc_dropout", "swag", "laplace", "ivon", "blob", "flat_lora", "sngp")


def method_class(name: str) -> type[Any]:
    """The options of a method, a dataclass with `fit`; raises UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"method: expected one of {', '.join(METHODS)}, found {name!r}{nearest(name, METHODS)}")
    return METHODS[name]


def method_name(method: object) -> str | None:
    """The name of a method's class; None for anything else."""
    return next((name for name, kind in METHODS.items() if type(method) is kind), None)
