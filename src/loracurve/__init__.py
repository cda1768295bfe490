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

from loracurve.bases import load_base
from loracurve.calibration import (
    conformal_quantile,
    fit_temperature,
    prediction_sets,
    selective_threshold,
)
from loracurve.config import CurveConfig, EvaluationConfig, LoraOptions, ModelConfig, RunConfig
from loracurve.errors import UserError
from loracurve.evaluation import predict_split
from loracurve.gauge import align
from loracurve.generate import GenerateConfig, Generation, generate
from loracurve.inference import predict, quadrature
from loracurve.loop import FitResult, LoopConfig
from loracurve.model import CurveModel, CurveSpec
from loracurve.objective import ObjectiveConfig
from loracurve.predictive import Predictive
from loracurve.run import fit_run, open_run
from loracurve.tasks import Task, TaskConfig, load_task
from loracurve.training import FitConfig, fit, fit_anchors, fit_curves

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
    "fit_curves",
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
