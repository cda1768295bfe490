"""The options of a run. YAML files and the command line are made from these dataclasses; there is no second list."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import peft
import torch

from loracurve.bases import Dtype, Quantisation
from loracurve.errors import UserError
from loracurve.gauge import Alignment
from loracurve.inference import Rule, quadrature
from loracurve.loop import LoopConfig
from loracurve.spec import FREE_SEGMENTS, CurveSpec
from loracurve.tasks import TaskConfig
from loracurve.training import FitConfig
from loracurve.tunnel import TunnelConfig

__all__ = ["CurveConfig", "EvaluationConfig", "LoraOptions", "ModelConfig", "RunConfig"]


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    name: str
    """A folder or a name on the hub."""
    dtype: Dtype = "auto"
    """Dtype of the frozen base weights; `auto` takes the checkpoint's."""
    trust_remote_code: bool = False
    """Allow code that comes with a hub model to run."""
    quantise: Quantisation = "none"
    """Hold the frozen weights of linear maps in 4 (nf4) or 8 bits (int8) with bitsandbytes. Nothing can then be folded
    into them: no scans, and points are run together."""
    shard: bool = False
    """With several processes, spread the frozen weights of the layers over them (FSDP2) instead of having them whole in
    each."""


@dataclass(frozen=True)
class LoraOptions:
    """The adapters; names as in `peft.LoraConfig`."""

    r: int = 8
    """Rank."""
    lora_alpha: float = 16
    """Scaling numerator: updates are scaled by lora_alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Names or a regular expression of the adapted linear maps, or all-linear."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input while training."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    layers_to_transform: list[int] | None = None
    """Adapt these layers only; lower ones then run once for all points (not in sequence classifiers)."""
    modules_to_save: list[str] | None = None
    """Linear layers trained whole beside the adapters (a new classification head is added by itself)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from r, by module name."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas that differ from lora_alpha, by module name."""
    init_lora_weights: Literal["kaiming", "gaussian"] = "kaiming"
    """Draw of A; B starts at 0."""

    def to_peft(self, base: str, classifier: bool) -> peft.LoraConfig:
        """The same as a `peft.LoraConfig` for a base model name."""
        values = {k: v for k, v in vars(self).items() if k != "init_lora_weights"}
        return peft.LoraConfig(
            **values,
            init_lora_weights=True if self.init_lora_weights == "kaiming" else "gaussian",
            base_model_name_or_path=base,
            task_type=peft.TaskType.SEQ_CLS if classifier else peft.TaskType.CAUSAL_LM,
        )


@dataclass(frozen=True)
class CurveConfig:
    """Shape of the curve."""

    kind: Literal["anchored", "free"] = "free"
    """free: all control points trained together; anchored: through independently fine-tuned adapters. Kind, segments
    and points of the training are what did best at equal cost on eight data sets (results/NOTES.md, defaults)."""
    anchors: int = 3
    """Number of adapters to train as anchors (anchored; their segments are one fewer)."""
    segments: int = FREE_SEGMENTS
    """Number of segments (free)."""
    degree: int = 2
    """Degree of each segment; 1: straight lines, a polygonal chain."""
    pieces: int = 1
    """Segments between two neighbouring anchors (anchored)."""
    closed: bool = False
    """The curve ends where it begins (anchored: behind the last anchor it goes back to the first)."""
    smooth: bool = False
    """The curve has no kinks at its joints: control points behind them are mirrored. Needs degree 2."""
    factors: Literal["both", "A", "B"] = "both"
    """Which factors vary along the curve; the other one is shared by all its points (free)."""
    alignment: Alignment = "balanced+procrustes"
    """Gauge alignment of the anchors before they are joined."""
    inner: Literal["line", "init"] = "line"
    """Start of the inner control points: on the straight line between anchors, or at the LoRA init."""

    def __post_init__(self) -> None:
        if self.kind == "anchored" and self.anchors < 2:
            raise UserError(f"curve.anchors: expected at least 2, found {self.anchors}")
        if self.segments < 1 or self.degree < 1 or self.pieces < 1:
            raise UserError(
                f"curve: expected segments, degree and pieces >= 1, found {self.segments}, {self.degree} and "
                f"{self.pieces}"
            )
        if self.kind == "anchored" and self.degree * self.pieces < 2:
            raise UserError(
                f"curve.degree: expected at least 2 for an anchored curve, found {self.degree}; or set pieces to 2"
            )
        if self.kind == "free" and self.pieces > 1:
            raise UserError(f"curve.pieces: expected 1 for a free curve, found {self.pieces}; set segments instead")
        if self.kind == "anchored" and self.factors != "both":
            raise UserError(
                f"curve.factors: expected both for a curve through anchors, which differ in A and B, found "
                f"{self.factors}; set kind to free"
            )
        self.spec(self.anchors)

    def spec(self, anchors: int) -> CurveSpec:
        """The shape of the curve (through so many anchors, where it is anchored)."""
        if self.kind == "free":
            return CurveSpec(self.segments, self.degree, closed=self.closed, smooth=self.smooth, factors=self.factors)
        return CurveSpec.anchored(anchors, self.degree, self.alignment, self.pieces, self.closed, self.smooth)


@dataclass(frozen=True)
class EvaluationConfig:
    """How the curve is averaged and judged."""

    points: int = 10
    """Points of the curve in the model average, that is forward passes at test time."""
    quadrature: Rule = "uniform"
    """uniform: equally spaced with both ends; gauss-legendre: nodes by segment; monte-carlo: random."""
    weights: Literal["uniform", "arc-length", "likelihood"] = "uniform"
    """Weights of the points. likelihood: proportional to exp(-N L(t) / T) with L the validation NLL of N rows."""
    temperature: float = 0.0
    """T of the likelihood weights; 0: fitted to the validation NLL of the average."""
    inference: Literal["curve", "tunnel"] = "curve"
    """curve: average points of the curve. tunnel: as many posterior samples in a tube around it, judged beside them."""
    tunnel: TunnelConfig = field(default_factory=TunnelConfig)
    """The tube and its sampler."""
    ood: list[str] = field(default_factory=list)
    """Data sets put into the same prompt to measure out-of-distribution detection."""
    seed: int = 0
    """Seed of Monte Carlo points and bootstrap intervals."""

    def __post_init__(self) -> None:
        if self.points < 1:
            raise UserError(f"points: expected at least 1, found {self.points}; ask for 10")
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"evaluation.temperature: expected a number >= 0, found {self.temperature}; 0 fits it to validation"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that `loracurve fit` needs."""

    model: ModelConfig
    task: TaskConfig
    lora: LoraOptions = field(default_factory=LoraOptions)
    curve: CurveConfig = field(default_factory=CurveConfig)
    adapters: list[str] = field(default_factory=list)
    """Existing PEFT adapter folders to use as anchors instead of training them."""
    anchor_training: LoopConfig = field(default_factory=LoopConfig)
    curve_training: FitConfig = field(default_factory=FitConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where losses are logged while training, beside the run's own history.json."""

    def __post_init__(self) -> None:
        if self.adapters and self.curve.kind == "free":
            raise UserError(
                "adapters: expected curve.kind anchored, a curve through them, found free; set curve.kind to anchored"
            )
        if len(self.adapters) == 1:
            raise UserError("adapters: expected at least 2 adapter folders, found 1; give another")
        if self.adapters and self.curve_training.bootstrap.kind == "everywhere":
            raise UserError(
                "curve_training.bootstrap.kind: expected tied with adapters that were trained without these weights, "
                "found everywhere; change it"
            )
        # What cannot work should be known before training, not after it.
        spec = self.curve.spec(len(self.adapters) or self.curve.anchors)
        self.curve_training.check_curve(spec)
        if self.evaluation.inference == "tunnel" and spec.size < 3:
            raise UserError(
                "evaluation.inference: expected curve for two control points, which span a line only, found tunnel; "
                "raise curve.degree"
            )
        quadrature(self.evaluation.quadrature, self.evaluation.points, spec.segments, torch.Generator())
