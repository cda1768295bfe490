"""The options of training a curve, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loracurve.bootstrap import BootstrapConfig
from loracurve.corruption import CorruptionConfig
from loracurve.errors import UserError
from loracurve.inference import quadrature
from loracurve.loop import LoopConfig
from loracurve.objective import ObjectiveConfig, resolve_tau
from loracurve.perturbation import PerturbationConfig, needs_shared_points, needs_single_point, strength
from loracurve.sampling import Sampling, check_sampling
from loracurve.spec import CurveSpec

__all__ = ["FitConfig", "validation_points"]


@dataclass(frozen=True)
class FitConfig(LoopConfig):
    """How a curve is trained."""

    steps: int = 1500
    """Optimiser steps. A free curve takes some five times those of a fine-tune, each of its control points a share."""
    points: int = 1
    """Points of the curve at which each example is seen in a step; a step costs that many forward and backward
    passes."""
    share_points: bool = False
    """All examples of a batch are run at the same points; otherwise each has its own."""
    point_passes: int = 1
    """Passes into which the points of a step are divided. With more than one, memory is that of one of them, for a
    further forward pass in all; gradients are the same."""
    layerwise: bool = False
    """Every adapted map has points of its own, drawn independently, instead of one t for the whole model."""
    sampling: Sampling = "stratified"
    """How points t in [0, 1] are drawn. stratified: one from each of as many equal parts as there are points. uniform:
    independent. arc-length: stratified by the curve's length, which is measured in every step. quasi-random: steps of
    the golden ratio. half-period: pairs t and t + 1/2."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Diversity term beside the likelihood."""
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    """Inputs on which the diversity term is taken."""
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    """Random weights of the examples along the curve."""
    perturbation: PerturbationConfig = field(default_factory=PerturbationConfig)
    """Noise on the weights while training."""
    evaluation_points: int = 7
    """Points of the model average that is validated, equally spaced. With one more than a multiple of the segments all
    joints are among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points < 1 or self.evaluation_points < 1:
            raise UserError(f"points: expected at least 1, found {min(self.points, self.evaluation_points)}")
        if not 1 <= self.point_passes <= self.points:
            raise UserError(f"point_passes: expected 1 to {self.points} (points), found {self.point_passes}; change it")
        self._check_perturbation()
        if self.objective.jsd != "none" and self.points < 2:
            raise UserError(f"a JSD term needs points >= 2, found {self.points}; set points to 2")
        check_sampling(self.sampling, self.points)
        self._check_corruption()
        for name, one_point in (
            ("share_points", not self.share_points),
            ("bootstrap.kind", self.bootstrap.kind != "none"),
            ("perturbation.kind", needs_single_point(self.perturbation)),
        ):
            if self.layerwise and one_point:
                raise UserError(
                    f"{name}: expected shared points, no bootstrap and no sam with layerwise, where a model has no "
                    "single t, found otherwise; turn layerwise off"
                )

    def check_curve(self, spec: CurveSpec) -> None:
        """Refuse what a curve of this shape cannot have; raises UserError."""
        anchored = not bool(spec.mask.all())
        validation_points(self.evaluation_points, spec)
        # Stands for the anchors' divergence, which is measured when training starts.
        resolve_tau(self.objective, 1.0 if anchored else None)
        if self.bootstrap.kind == "everywhere" and spec.closed:
            raise UserError(
                "bootstrap.kind: expected tied or none for a closed curve, whose ends are one point but have different "
                "weights, found everywhere; change it"
            )
        if self.bootstrap.kind == "tied" and not anchored:
            raise UserError(
                "bootstrap.kind: expected everywhere for a free curve, which has no anchors, found tied; change it"
            )

    def _check_corruption(self) -> None:
        kind = self.corruption.kind
        if kind == "none":
            return
        if self.objective.jsd not in ("bonus", "hinge"):
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
        if self.compile and noise.kind in ("flat_lora", "lora_space"):
            raise UserError(
                f"compile: expected false with perturbation.kind {noise.kind}, whose draws compiled layers could not "
                "follow, found true; set compile to false"
            )
        strength(noise, 0, self.steps)


def validation_points(points: int, spec: CurveSpec) -> tuple[Tensor, Tensor]:
    """t and weights of the average that tells a curve's states apart (`quadrature`, uniform).

    Raises:
        UserError: all of them are anchors, which training does not move.
    """
    t, weights = quadrature("uniform", points, spec.segments, closed=spec.closed)
    fixed = torch.tensor(spec.anchor_times, dtype=t.dtype)
    if len(fixed) and (t.unsqueeze(1) - fixed).abs().amin(1).max() < 1e-9:
        raise UserError(
            f"evaluation_points: expected some between the anchors, which training does not move, found {points}, all "
            f"of them anchors; ask for {FitConfig.evaluation_points}"
        )
    return t, weights
