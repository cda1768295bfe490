"""Places that modules and names had before the packages were made; they work for one version, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

__all__ = ["MODULES", "NAMES", "names", "watch"]

MODULES: dict[str, tuple[str, ...]] = {
    "barriers": ("landscape.barriers",),
    "baselines.base": ("baselines.method",),
    "baselines.own_loop": ("baselines.single_adapter_loop",),
    "baselines.plain_peft": ("baselines.peft_model",),
    "bases": ("model.base_model", "model.config"),
    "batching": ("tasks.batching",),
    "bench.reporting": ("bench.tables.write",),
    "calibration": ("inference.calibration",),
    "config": ("runs.config", "curve.config", "model.config", "inference.config"),
    "config_files": ("runs.config", "system.options"),
    "corruption": ("training.config", "training.corruption"),
    "distributed": ("system.distributed",),
    "diversity": ("landscape.diversity",),
    "environment": ("system.environment",),
    "errors": ("system.errors",),
    "evaluation": ("inference.prediction", "inference.model_average", "runs.evaluate", "tasks.encoding"),
    "fit_config": ("training.config", "training.micro_batches"),
    "gauge": ("curve.gauge", "curve.config"),
    "harness": ("runs.lm_eval",),
    "loop": ("training.loop", "training.config"),
    "lora_space": ("curve.lora_space", "curve.files", "curve.lora_config", "model.injection"),
    "metrics": ("inference.metrics", "inference.intervals"),
    "objective": ("training.objective", "training.config", "inference.information"),
    "paths": ("landscape.paths", "landscape.config"),
    "perturbation": ("training.config", "training.perturbation", "training.sam", "model.weight_noise"),
    "planes": ("landscape.plane",),
    "predictive": ("inference.predictive",),
    "quickstart": ("runs.quickstart",),
    "run": ("runs.run", "runs.fit", "system.folders", "system.environment"),
    "sampling": ("curve.sampling", "curve.config"),
    "scanning": ("landscape.survey", "landscape.config"),
    "server": ("serving",),
    "serving.client": ("serving.multi_lora_client",),
    "sft": ("training.sft",),
    "sharding": ("model.fsdp",),
    "sharing": ("curve.hub", "runs.share"),
    "sharpness": ("landscape.sharpness",),
    "slopes": ("landscape.slopes",),
    "spec": ("curve.spec",),
    "splits": ("inference.prediction",),
    "storage": ("curve.files", "system.files", "system.tensors", "system.tables"),
    "subjects": ("landscape.subject", "runs.scan"),
    "tasks.data": ("tasks.dataset",),
    "tasks.hub": ("tasks.hub_datasets",),
    "trainer": ("training.trainer",),
}
"""Modules that are gone, and where their names are now."""

NAMES: dict[str, dict[str, str]] = {
    "curve": {
        "arc_length arc_length_parameter chord_length coefficient_gram coefficients control_polygon_length "
        "derivative_coefficients gram lipschitz_bound on_line speed": "curve.bezier",
        "gauss_legendre": "curve.quadrature",
        "number_of_control_points": "curve.spec",
    },
    "inference": {
        "Predictive": "inference.predictive",
        "Rule": "curve.config",
        "arc_length_weights effective_points likelihood_weights": "inference.model_average",
        "evaluation_mode without_gradients": "model.runner",
        "predict": "inference.prediction",
        "quadrature": "curve.quadrature",
    },
    "landscape": {"LaidOut PathScan Scan lay_out mean_loss predict_merged scan_paths": "landscape.scan"},
    "model": {"CurveModel": "model.curve_model", "CurveSpec": "curve.spec"},
    "serving": {"NextToken ServedCurve ServedText": "serving.multi_lora_client"},
    "tasks": {
        "Scoring TaskConfig": "tasks.config",
        "Dataset Kind Row as_text read_dataset read_rows split_validation": "tasks.dataset",
        "Encoded Example": "tasks.encoding",
        "HUB load_from_hub": "tasks.hub_datasets",
        "Task load_task open_dataset": "tasks.task",
        "TEMPLATES Template": "tasks.templates",
    },
    "training": {"FitConfig": "training.config", "fit_anchors": "training.fit"},
}
"""Names that packages held themselves, or modules of their name did, and where these are now."""


def watch() -> None:
    """Find modules at their old places from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def names(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package for names that it held itself."""
    places = NAMES[package.partition(".")[2]]
    place = {name: where for group, where in places.items() for name in group.split()}
    return lambda name: _found(package, name, (place[name],) if name in place else ())


def _found(owner: str, name: str, places: Sequence[str]) -> Any:
    for place in () if name.startswith("__") else places:
        module = import_module(f"loracurve.{place}")
        if name in getattr(module, "__all__", ()):
            text = f"{owner}.{name} is loracurve.{place}.{name} now; the old place goes in the next version"
            warnings.warn(text, DeprecationWarning, stacklevel=3)
            return getattr(module, name)
    raise AttributeError(f"module {owner!r} has no attribute {name!r}")


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        old = name.removeprefix("loracurve.")
        return ModuleSpec(name, _Old(MODULES[old])) if old != name and old in MODULES else None


class _Old(Loader):
    """A module that hands its names on, and that `python -m` runs as the first of the new ones."""

    def __init__(self, places: Sequence[str]) -> None:
        self.places = places

    def exec_module(self, module: ModuleType) -> None:
        owner, places = module.__name__, self.places
        vars(module)["__getattr__"] = lambda name: _found(owner, name, places)

    def get_code(self, name: str) -> CodeType:
        new = f"loracurve.{self.places[0]}"
        run = f"sys.argv[0] = sys.argv[0] or {name!r}; runpy.run_module({new!r}, run_name='__main__')"
        return compile(f"import runpy, sys; {run}", name, "exec")
