"""A tiny model with a random curve, its rows laid out for the landscape."""

from __future__ import annotations

from pathlib import Path as FilePath

import torch
from torch import Tensor

from helpers.made import made_task, vocabulary
from helpers.tiny import lora_config, random_points, tiny
from loracurve.curve.spec import CurveSpec
from loracurve.landscape.scan import LaidOut, lay_out
from loracurve.model.curve_model import CurveModel


def setting(
    folder: FilePath, architecture: str = "qwen2", scoring: str = "letter", dtype: torch.dtype = torch.float64
) -> tuple[CurveModel, LaidOut]:
    """A tiny model with a random curve of two segments, and its training rows."""
    task = made_task(folder, architecture, scoring)
    model = CurveModel(
        tiny(architecture, dtype, vocabulary(task), labels=2), lora_config(architecture), CurveSpec(2, 2)
    )
    model.set_curve(model.spec, random_points(model))
    return model, lay_out(model, task.encode("train"), "train", 12)


def products(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: adapter[n.replace("_A", "_B")] @ a for n, a in adapter.items() if "lora_A" in n}
