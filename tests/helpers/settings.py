"""Settings in which methods are fitted."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.made import made_task, vocabulary
from helpers.matrix import SCORING
from helpers.tiny import lora_config, random_points, tiny
from loracurve.baselines.method import Method, Setting
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.inference.predictive import Predictive
from loracurve.model.curve_model import CurveModel
from loracurve.training.config import LoopConfig

TRAINING = LoopConfig(steps=4, batch_size=4, learning_rate=1e-2, evaluate_every=2)


def of(setting: Setting, method: Method) -> Predictive:
    return method.fit(setting).predict(setting.task.encode("test"))


def members(setting: Setting) -> torch.Tensor:
    """[4, E, C] probabilities of the anchors, one by one."""
    out = []
    for m in range(4):
        setting.model.set_curve(CurveSpec.slots(1), {n: p[m : m + 1] for n, p in setting.anchors.items()})
        out.append(predict_split(setting.model, setting.task.encode("test"), torch.zeros(1)).probs)
    return torch.stack(out)


LOOP = LoopConfig(steps=12, batch_size=4, learning_rate=1e-2)


def posterior_setting(
    tmp_path: Path, architecture: str = "qwen2", loop: LoopConfig = LOOP, samples: int = 4
) -> Setting:
    task = made_task(tmp_path / architecture, architecture, SCORING[architecture])
    base = tiny(architecture, vocabulary=vocabulary(task), labels=2)
    model = CurveModel(base, lora_config(architecture), CurveSpec.slots(2))
    return Setting(model, task, random_points(model, scale=0.05), loop, samples)
