"""Straight lines through the anchors, without training: in (A, B), in an aligned gauge, or in Delta W."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loracurve.baselines.method import Fitted, Setting, along_curve
from loracurve.curve.quadrature import quadrature
from loracurve.curve.spec import CurveSpec
from loracurve.inference.predictive import Predictive
from loracurve.landscape.config import PathName
from loracurve.landscape.paths import Path, anchor_paths
from loracurve.landscape.scan import lay_out, predict_merged
from loracurve.system.errors import UserError
from loracurve.system.ranges import Slots, check_ranges
from loracurve.tasks.encoding import Encoded

__all__ = ["Line"]


@dataclass(frozen=True)
class Line:
    """The average over equally spaced points of the chain of straight lines through the first anchors."""

    path: PathName = "straight"
    """straight: A and B as trained; balanced, procrustes, balanced+procrustes: aligned first; delta_w: the products;
    norm_matched: straight, each update rescaled to the norm between the ends'."""
    anchors: Slots = 3
    """Number of anchors."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.path == "curve":
            raise UserError("path: expected an untrained path, found curve; use the method curve")

    def fit(self, setting: Setting) -> Fitted:
        path = anchor_paths(setting.first(self.anchors), [self.path], setting.model.scalings)[self.path]
        t, _ = quadrature("uniform", setting.samples, path.segments)
        if path.form == "factors" and not path.norm_matched:
            return along_curve(setting, CurveSpec.slots(self.anchors), path.points, t, float(self.anchors))
        return Fitted(lambda encoded: _merged(setting, path, t, encoded), len(t), float(self.anchors))


def _merged(setting: Setting, path: Path, t: torch.Tensor, encoded: Encoded) -> Predictive:
    """Points of any rank, one after the other, folded into the weights (rounded to the dtype of the base)."""
    split = lay_out(setting.model, encoded, "split")
    points = [predict_merged(setting.model, path.adapter(x), [split])[0].point_log_probs for x in t.tolist()]
    return Predictive.from_log_probs(torch.cat([p for p in points if p is not None]))
