"""The options of training a curve, and which of them go together."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from loracurve.curve.config import Sampling, check_sampling
from loracurve.curve.spec import CurveSpec
from loracurve.system.errors import UserError, nearest
from loracurve.system.ranges import (
    Amount,
    Count,
    NonNegative,
    PartBelowOne,
    Points,
    Positive,
    PositiveShare,
    Rows,
    Seed,
    Share,
    check_ranges,
)

__all__ = [
    "CorruptionConfig",
    "FitConfig",
    "LoopConfig",
    "ObjectiveConfig",
    "PerturbationConfig",
    "needs_shared_points",
    "needs_single_point",
    "passes_of",
    "resolve_tau",
    "steps_for",
    "strength",
]


Schedule = Literal["constant", "linear", "cosine", "one-cycle"]


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train."""

    steps: Count = 300
    """Optimiser steps."""
    batch_size: Rows = 16
    """Examples in each step (for each anchor, where several are trained side by side)."""
    accumulation: Count = 1
    """Micro-batches that a step is split into, to save memory."""
    learning_rate: Positive = 5e-4
    """Peak learning rate of AdamW."""
    schedule: Schedule = "linear"
    """Decay after the warm-up. one-cycle: cosine up to the peak and down to nearly 0 (Smith & Topin 2018)."""
    warmup: PartBelowOne = 0.06
    """Part of the steps in which the learning rate rises linearly."""
    betas: tuple[PartBelowOne, PartBelowOne] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled decay, acting on the curve point theta(t) (on each adapter for anchors), never on frozen anchors."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this norm (for each anchor on its own); 0 turns clipping off."""
    evaluate_every: Amount = 0
    """Steps between validations, then on all rows; 0: after every tenth of the run, within validation_share."""
    validation_share: PositiveShare | None = 0.2
    """With evaluate_every 0, validations take at most this part of the training's products: for it they look at fewer
    rows (100 at least, drawn by their ids), then come less often. A token counts once at each point, in training three
    times (forward and backward). null: all rows. The figures of a finished run are of all rows."""
    patience: Amount = 0
    """Stop after this many validations without improvement (of all that are trained side by side); 0: never."""
    keep: Literal["best", "last"] = "best"
    """Which state remains: that of the best validation NLL, or the last."""
    row_tokens: Count = 256
    """Short examples are packed into rows of up to this many tokens."""
    capture: bool = True
    """On a GPU, capture whole steps in CUDA graphs; each then has as many rows, filled evenly and padded to a few
    lengths."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_every: Amount = 0
    """Steps between checkpoints where a run folder is given; 0: at validations a minute after the last one. The
    last step is followed by one too."""
    seed: Seed = 0
    """Seed of data order and initial draws."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.accumulation > self.batch_size:
            raise UserError(f"accumulation {self.accumulation} is larger than batch_size {self.batch_size}; lower it")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised besides the mean negative log-likelihood of the curve points."""

    jsd: Literal["none", "bonus", "hinge"] = "none"
    """Diversity term. bonus: mean NLL - weight x Jensen-Shannon divergence of the points' predictions. hinge: mean NLL
    + weight x max(tau - mean pairwise divergence, 0)."""

    weight: NonNegative = 0.0
    """Weight of the diversity term, at least 0. A bonus above 1 pays for diversity that the data do not support. The
    paper's authors use a hinge of weight 5."""

    tau: NonNegative = 0.0
    """hinge: the divergence that a pair of points shall have on the average of a batch, in nats (the paper's authors:
    0.1). 0: tau_relative decides."""

    tau_relative: Positive = 1.0
    """hinge: the same as a multiple of the anchors' mean pairwise divergence on validation data."""

    def __post_init__(self) -> None:
        check_ranges(self, "objective")
        forms = ("none", "bonus", "hinge")
        if self.jsd not in forms:
            raise UserError(f"objective.jsd: expected one of {', '.join(forms)}, found {self.jsd!r}; choose one")
        if self.jsd == "none" and self.weight != 0:
            raise UserError(
                f"objective.weight: expected 0 with jsd 'none', found {self.weight}; set jsd to bonus or hinge"
            )
        if self.jsd != "hinge" and (self.tau, self.tau_relative) != (0, 1):
            raise UserError(
                f"objective.tau: expected none with jsd {self.jsd!r}, found tau {self.tau} and tau_relative "
                f"{self.tau_relative}; set jsd to hinge"
            )
        if self.tau and self.tau_relative != 1:
            raise UserError(
                f"objective.tau: expected tau or tau_relative, found {self.tau} and {self.tau_relative}; leave one out"
            )
        if self.jsd == "bonus" and self.weight > 1:
            # To second order NLL - JSD is the averaged prediction's NLL, so 1 is all that the likelihood supports.
            warnings.warn(f"JSD bonus of weight {self.weight} > 1 rewards more diversity than the data", stacklevel=3)
        if self.tau >= math.log(2):
            warnings.warn(f"hinge target tau {self.tau} is beyond log 2, which no pair of points reaches", stacklevel=3)


def resolve_tau(config: ObjectiveConfig, anchor_jsd: float | None) -> float:
    """The target of the hinge in nats: `config.tau`, or `config.tau_relative` times what the anchors have.

    Args:
        config: form and target; other forms than the hinge have target 0.
        anchor_jsd: the anchors' mean pairwise Jensen-Shannon divergence on validation data (the mean over examples of
            `pairwise_jensen_shannon`), in nats; None for a free curve.

    Raises:
        UserError: a relative target without anchors, or with anchors that predict the same.
    """
    if config.jsd != "hinge":
        return 0.0
    if config.tau > 0:
        return config.tau
    if anchor_jsd is None:
        raise UserError(
            "objective.tau: expected a target in nats for a free curve, which has no anchors to measure it by, "
            "found 0; set tau, for instance to 0.02"
        )
    if not 0 < anchor_jsd < math.inf:
        raise UserError(
            f"objective.tau_relative: expected anchors whose predictions differ, found a divergence of {anchor_jsd} "
            "nats; set tau"
        )
    return config.tau_relative * anchor_jsd


KINDS = ("none", "flat_lora", "lora_space", "sam")

SCHEDULES = ("constant", "ramp", "cyclic")


@dataclass(frozen=True)
class PerturbationConfig:
    """Noise on the weights while training, to find flat minima."""

    kind: Literal["none", "flat_lora", "lora_space", "sam"] = "none"
    """flat_lora: noise on the merged weight of each adapted map, costs two more products with a weight-sized matrix.
    lora_space: noise on the factors A and B, cheap, for quantised bases too. sam: ascent step first, costs two passes,
    needs points 1."""
    rho: NonNegative = 0.05
    """Strength. flat_lora and lora_space: noise relative to the size of a row (the authors take 0.05 for constant and
    ramp, 0.25 for cyclic). sam: length of the ascent step in the norm of all factors together."""
    schedule: Literal["constant", "ramp", "cyclic"] = "constant"
    """constant: rho. ramp: linearly up to rho at the last step. cyclic: rho (1 - cos), mean rho and peak 2 rho."""
    cycles: Count = 50
    """Cycles in the run (cyclic)."""
    norm_gradient: bool = False
    """Let gradients flow through the row norms that scale the noise of flat_lora."""

    def __post_init__(self) -> None:
        check_ranges(self, "perturbation")
        for name, valid in (("kind", KINDS), ("schedule", SCHEDULES)):
            found = getattr(self, name)
            if found not in valid:
                raise UserError(
                    f"perturbation.{name}: expected one of {', '.join(valid)}, found {found!r}{nearest(found, valid)}"
                )


def strength(config: PerturbationConfig, step: int, steps: int) -> float:
    """The strength of a step (0-based) of a run of `steps`, in units of `rho`'s kind.

    Raises:
        UserError: more cycles than half the steps, which the steps could not follow.
    """
    if config.schedule == "constant" or config.kind == "none":
        return config.rho
    if config.schedule == "ramp":
        return config.rho * (step + 1) / steps
    if steps < 2 * config.cycles:
        raise UserError(
            f"perturbation.cycles: {config.cycles} cycles need at least {2 * config.cycles} steps, found {steps}; "
            f"lower cycles to {max(steps // 6, 1)}"
        )
    return config.rho * (1 - math.cos(2 * math.pi * config.cycles * step / steps))


def needs_shared_points(config: PerturbationConfig) -> bool:
    """Whether all rows of a micro-batch must lie at the same curve points (the route *points*)."""
    return config.kind != "none"


def needs_single_point(config: PerturbationConfig) -> bool:
    """Whether a micro-batch must lie at one t: `sam`, whose ascent step belongs to one theta(t)."""
    return config.kind == "sam"


# Above it labels no longer fit the inputs, and disagreement is bought where the model should be sure.
HIGHEST_RATE = 0.05


@dataclass(frozen=True)
class CorruptionConfig:
    """On which inputs the diversity term is taken."""

    kind: Literal["none", "tokens", "attention", "text"] = "none"
    """none: the training inputs. tokens: with random tokens in place of some. attention: with some tokens invisible.
    text: other inputs, without labels (file). All but none double the cost of a step."""

    rate: Share = 0.05
    """Highest share of tokens that are corrupted, 0 to 1; each sequence's own is uniform between 0 and this."""

    file: str | None = None
    """text: JSONL rows as in training, or plain text with one input a line (classification, language modelling)."""

    def __post_init__(self) -> None:
        check_ranges(self, "corruption")
        if self.kind not in ("none", "tokens", "attention", "text"):
            raise UserError(
                f"corruption.kind: expected none, tokens, attention or text, found {self.kind!r}; choose one"
            )
        if (self.kind == "text") != (self.file is not None):
            raise UserError(
                f"corruption.file: expected a file with kind text and none otherwise, found kind {self.kind} and file "
                f"{self.file}; give both or neither"
            )
        if self.kind in ("tokens", "attention") and self.rate > HIGHEST_RATE:
            warnings.warn(f"corruption rate {self.rate} > {HIGHEST_RATE} may change what inputs mean", stacklevel=3)


@dataclass(frozen=True)
class FitConfig(LoopConfig):
    """How a curve is trained."""

    steps: Count = 1500
    """Optimiser steps. A free curve takes about five times those of a fine-tune: a step moves only the control points
    near its t."""
    points: Points = 1
    """Points of the curve at which each example is seen in a step; a step costs that many forward and backward
    passes."""
    share_points: bool = False
    """All examples of a batch are run at the same points; otherwise each has its own."""
    point_passes: Count = 1
    """Passes into which the points of a step are divided. With more than one, memory is that of one of them, for a
    further forward pass in all; gradients are the same."""
    layerwise: bool = False
    """Every adapted map has points of its own, drawn independently, instead of one t for the whole model."""
    sampling: Sampling = "stratified"
    """How points t in [0, 1] are drawn. stratified: one from each of as many equal parts as there are points. uniform:
    independent. arc-length: stratified by the curve's length, which is measured in every step. half-period: pairs t and
    t + 1/2."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Diversity term beside the likelihood."""
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    """Inputs on which the diversity term is taken."""
    perturbation: PerturbationConfig = field(default_factory=PerturbationConfig)
    """Noise on the weights while training."""
    evaluation_points: Points = 7
    """Points of the model average that is validated, equally spaced. With one more than a multiple of the segments all
    joints are among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.point_passes <= self.points:
            raise UserError(f"point_passes: expected 1 to {self.points} (points), found {self.point_passes}; change it")
        self._check_perturbation()
        if self.objective.jsd != "none" and self.points < 2:
            raise UserError(f"a JSD term needs points >= 2, found {self.points}; set points to 2")
        check_sampling(self.sampling, self.points)
        self._check_corruption()
        for name, one_point in (
            ("share_points", not self.share_points),
            ("perturbation.kind", needs_single_point(self.perturbation)),
        ):
            if self.layerwise and one_point:
                raise UserError(
                    f"{name}: expected shared points and no sam with layerwise, where a model has no "
                    "single t, found otherwise; turn layerwise off"
                )

    def check_curve(self, spec: CurveSpec) -> None:
        """Refuse what a curve of this shape cannot have; raises UserError."""
        check_validation_points(self.evaluation_points, spec)
        # Stands for the anchors' divergence, which is measured when training starts.
        resolve_tau(self.objective, 1.0 if spec.anchor_times else None)

    def _check_corruption(self) -> None:
        kind = self.corruption.kind
        if kind == "none":
            return
        if self.objective.jsd == "none":
            raise UserError(
                f"corruption.kind: expected none with objective.jsd {self.objective.jsd!r}, found {kind}; set jsd to "
                "bonus or hinge, which need no labels"
            )
        for name, needed in (("share_points", True), ("gradient_checkpointing", False)):
            if kind == "text" and getattr(self, name) is not needed:
                raise UserError(
                    f"{name}: expected {str(needed).lower()} with corruption.kind text, whose batches have other "
                    f"shapes, found {str(not needed).lower()}; change one of them"
                )

    def _check_perturbation(self) -> None:
        noise = self.perturbation
        if needs_shared_points(noise) and not self.share_points:
            raise UserError(
                f"share_points: expected true with perturbation.kind {noise.kind}, whose noise is made for all rows at "
                "one t, found false; set share_points to true"
            )
        if needs_single_point(noise) and self.objective.jsd != "none":
            raise UserError(
                f"objective.jsd: expected none with perturbation.kind {noise.kind}, which sees one point in each "
                f"micro-batch, found {self.objective.jsd!r}; leave one of them out"
            )
        if needs_single_point(noise) and self.points > 1:
            raise UserError(
                f"points: expected 1 with perturbation.kind {noise.kind}, whose ascent step belongs to one t in each "
                f"micro-batch, found {self.points}; set points to 1"
            )
        if self.point_passes > 1 and noise.kind in ("flat_lora", "lora_space"):
            raise UserError(
                f"point_passes: expected 1 with perturbation.kind {noise.kind}, whose noise is drawn for all points "
                f"together, found {self.point_passes}; set it to 1"
            )
        strength(noise, 0, self.steps)


def passes_of(training: FitConfig) -> int:
    """Forward and backward passes of each example in a step: its points, on corrupted inputs too, twice for `sam`."""
    other_inputs = training.corruption.kind != "none"
    return training.points * (1 + other_inputs + (training.perturbation.kind == "sam"))


def check_validation_points(points: int, spec: CurveSpec) -> None:
    """Refuse evenly spaced points of which all are anchors, which training does not move; raises UserError."""
    size = spec.segments * spec.degree
    step = Fraction(1, points if spec.closed else max(points - 1, 1))
    t = [Fraction(1, 2)] if points == 1 and not spec.closed else [i * step for i in range(points)]
    anchors = {Fraction(k, size) for k, flag in enumerate(spec.trainable) if not flag}
    if anchors and anchors.issuperset(t):
        raise UserError(
            f"evaluation_points: expected some between the anchors, which training does not move, found {points}, all "
            f"of them anchors; ask for {FitConfig.evaluation_points}"
        )


def steps_for(rows: int) -> int:
    """Steps of a free curve for so many training rows: 15 passes in batches of 16, at least 100 and at most 1500."""
    passes = math.ceil(_PASSES * rows / FitConfig.batch_size)
    return min(max(passes, _FEWEST_STEPS), FitConfig.steps)


_PASSES, _FEWEST_STEPS = 15, 100
