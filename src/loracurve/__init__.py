"""Bayesian fine-tuning of language models with curves of LoRA adapters.

import loracurve as lc

model = lc.CurveModel.from_adapters(base, ["runs/a0", "runs/a1", "runs/a2"], degree=2)
lc.fit(model, task, lc.FitConfig(steps=300))
predictive = lc.predict_split(model, task.encode("test"))

Names are loaded when they are first used: `import loracurve` alone imports neither torch nor transformers.
"""

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loracurve.system.moved import watch
from loracurve.system.version import __version__ as __version__

if TYPE_CHECKING:
    from loracurve.curve.config import CurveConfig, LoraOptions
    from loracurve.curve.gauge import align
    from loracurve.curve.quadrature import quadrature
    from loracurve.curve.spec import CurveSpec
    from loracurve.inference.calibration import (
        conformal_quantile,
        fit_temperature,
        prediction_sets,
        selective_threshold,
    )
    from loracurve.inference.config import EvaluationConfig, GenerateConfig
    from loracurve.inference.generation import Generation, generate
    from loracurve.inference.prediction import predict, predict_split
    from loracurve.inference.predictive import Predictive
    from loracurve.model.base_model import load_base
    from loracurve.model.config import ModelConfig
    from loracurve.model.curve_model import CurveModel
    from loracurve.runs.classifier import CurveClassifier
    from loracurve.runs.config import RunConfig
    from loracurve.runs.fit import fit_run
    from loracurve.runs.pipeline import CurvePipeline
    from loracurve.runs.run import open_run
    from loracurve.runs.save import save_run
    from loracurve.system.errors import UserError
    from loracurve.tasks.config import TaskConfig
    from loracurve.tasks.task import Task, load_task
    from loracurve.training.config import FitConfig, LoopConfig, ObjectiveConfig
    from loracurve.training.fit import fit, fit_anchors
    from loracurve.training.loop import FitResult

_PLACES = {
    "curve.config": ("CurveConfig", "LoraOptions"),
    "curve.gauge": ("align",),
    "curve.quadrature": ("quadrature",),
    "curve.spec": ("CurveSpec",),
    "inference.calibration": ("conformal_quantile", "fit_temperature", "prediction_sets", "selective_threshold"),
    "inference.config": ("EvaluationConfig", "GenerateConfig"),
    "inference.generation": ("Generation", "generate"),
    "inference.prediction": ("predict", "predict_split"),
    "inference.predictive": ("Predictive",),
    "model.base_model": ("load_base",),
    "model.config": ("ModelConfig",),
    "model.curve_model": ("CurveModel",),
    "runs.classifier": ("CurveClassifier",),
    "runs.config": ("RunConfig",),
    "runs.fit": ("fit_run",),
    "runs.pipeline": ("CurvePipeline",),
    "runs.run": ("open_run",),
    "runs.save": ("save_run",),
    "system.errors": ("UserError",),
    "tasks.config": ("TaskConfig",),
    "tasks.task": ("Task", "load_task"),
    "training.config": ("FitConfig", "LoopConfig", "ObjectiveConfig"),
    "training.fit": ("fit", "fit_anchors"),
    "training.loop": ("FitResult",),
}
_PLACE = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "CurveClassifier",
    "CurveConfig",
    "CurveModel",
    "CurvePipeline",
    "CurveSpec",
    "EvaluationConfig",
    "FitConfig",
    "FitResult",
    "GenerateConfig",
    "Generation",
    "LoopConfig",
    "LoraOptions",
    "ModelConfig",
    "ObjectiveConfig",
    "Predictive",
    "RunConfig",
    "Task",
    "TaskConfig",
    "UserError",
    "align",
    "conformal_quantile",
    "fit",
    "fit_anchors",
    "fit_run",
    "fit_temperature",
    "generate",
    "load_base",
    "load_task",
    "open_run",
    "predict",
    "predict_split",
    "prediction_sets",
    "quadrature",
    "save_run",
    "selective_threshold",
]

# PEFT imports bitsandbytes where there is one, which on a CPU warns that it lacks kernels that would make it faster.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
watch()


def __getattr__(name: str) -> Any:
    if name in _PLACE:
        value = globals()[name] = getattr(import_module(f"loracurve.{_PLACE[name]}"), name)
        return value
    module = f"loracurve.{name}"
    if not name.startswith("_") and find_spec(module) is not None:
        return import_module(module)
    raise AttributeError(f"module 'loracurve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACE})
