"""The one matrix of the tests: models of each architecture, in two precisions, times kinds of curve.

A test takes the axes that its subject depends on as decorators, each of which gives one argument:
`@matrix.architectures` (or `decoders`, or `decoder_and_encoder` where each costs seconds), `@matrix.kinds`,
`@matrix.segments`, `@matrix.dtypes`, and `@matrix.shapes` for curves whose control points depend on each other.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.made import made_task, vocabulary
from helpers.tiny import lora_config, tiny
from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.tasks.task import Task

SCORING = {"qwen2": "letter", "llama": "text", "encoder": "head"}
"""how each architecture answers, where a test does not say"""
ARCHITECTURES = list(SCORING)
KINDS = ["free", "anchored"]
SEGMENTS = [1, 2]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    CurveSpec(3, 2, closed=True),
    CurveSpec(3, 1),
    CurveSpec(2, 2, factors="A"),
    CurveSpec(2, 2, factors="B", closed=True),
    CurveSpec.anchored(2, 1, pieces=2),
    CurveSpec.anchored(3, 3, closed=True),
]

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
decoders = pytest.mark.parametrize("architecture", ["qwen2", "llama"])
decoder_and_encoder = pytest.mark.parametrize("architecture", ["qwen2", "encoder"])
kinds = pytest.mark.parametrize("kind", KINDS)
segments = pytest.mark.parametrize("segments", SEGMENTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
shapes = pytest.mark.parametrize("spec", SHAPES)

QUIET = {"progress": False}


def curve_of(kind: str, segments: int) -> CurveSpec:
    """The quadratic curve of a kind with so many segments."""
    return CurveSpec(segments, 2) if kind == "free" else CurveSpec.anchored(segments + 1, 2)


def build(
    architecture: str, folder: Path, spec: CurveSpec, dtype: torch.dtype = torch.float32, **options: object
) -> tuple[CurveModel, nn.Module, Task]:
    """A tiny curve model without dropout of its base, its untouched base, and a made task."""
    task = made_task(folder, architecture, SCORING[architecture])
    base = tiny(architecture, dtype, vocabulary(task), labels=2)
    if architecture == "encoder":
        base.config.hidden_dropout_prob = base.config.attention_probs_dropout_prob = 0.0
        for m in base.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
    untouched = copy.deepcopy(base)
    return CurveModel(base, lora_config(architecture, **options), spec), untouched, task
