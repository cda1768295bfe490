"""Bayesian fine-tuning of language models with curves of LoRA adapters.

import loracurve as lc

model = lc.CurveModel.from_adapters(base, ["runs/a0", "runs/a1", "runs/a2"], degree=2)
lc.fit(model, task, lc.FitConfig(steps=300))
predictive = lc.predict_split(model, task.encode("test"), t)
"""

import logging
from importlib.metadata import PackageNotFoundError, version

# PEFT imports bitsandbytes where there is one, which on a CPU warns that it lacks kernels that would make it faster.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from loracurve.curve.config import CurveConfig, LoraOptions
from loracurve.curve.gauge import align
from loracurve.curve.quadrature import quadrature
from loracurve.curve.spec import CurveSpec
from loracurve.inference.calibration import conformal_quantile, fit_temperature, prediction_sets, selective_threshold
from loracurve.inference.config import EvaluationConfig, GenerateConfig
from loracurve.inference.generation import Generation, generate
from loracurve.inference.prediction import predict, predict_split
from loracurve.inference.predictive import Predictive
from loracurve.model.base_model import load_base
from loracurve.model.config import ModelConfig
from loracurve.model.curve_model import CurveModel
from loracurve.runs.config import RunConfig
from loracurve.runs.fit import fit_run
from loracurve.runs.run import open_run
from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.task import Task, load_task
from loracurve.training.config import FitConfig, LoopConfig, ObjectiveConfig
from loracurve.training.fit import fit, fit_anchors
from loracurve.training.loop import FitResult

try:
    __version__ = version("loracurve")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CurveConfig",
    "CurveModel",
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
    "selective_threshold",
]
