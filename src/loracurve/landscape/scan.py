"""The loss along paths through LoRA space: every point is one merged evaluation.

An adapter of any rank is folded into copies of the weights it touches, W' = W0 + s B A, and whole splits are then
predicted at the cost of the base model. A merged weight is rounded to the dtype of the base: with a bfloat16 base that
moves the loss by about 2e-3 nats, so paths of small barriers are scanned on a float32 copy of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor

from loracurve.inference.prediction import point_nll, predict_folded
from loracurve.inference.predictive import Predictive
from loracurve.landscape.paths import Path
from loracurve.model.curve_model import CurveModel
from loracurve.system.randomness import generator
from loracurve.tasks.batching import Batch, evaluation_batches
from loracurve.tasks.encoding import Encoded

__all__ = ["LaidOut", "PathScan", "Scan", "lay_out", "mean_loss", "predict_merged", "scan_paths"]


@dataclass(frozen=True, eq=False)
class LaidOut:
    """A split as batches on the model's device, laid out once for all points, and its labels ``[E]``."""

    name: str
    encoded: Encoded
    batches: list[Batch]
    labels: Tensor

    @property
    def examples(self) -> int:
        """Number of predictions: rows, or target tokens of language modelling."""
        return self.encoded.predictions


def lay_out(model: CurveModel, encoded: Encoded, name: str, rows: int | None = None, seed: int = 0) -> LaidOut:
    """Batches of a split, of `rows` of its rows drawn by the seed (None: all)."""
    if rows is not None and rows < len(encoded):
        # Drawn, because splits may be sorted; in the split's order.
        drawn = torch.randperm(len(encoded), generator=generator(seed, "scan rows", name))[:rows].sort().values
        encoded = replace(encoded, examples=[encoded.examples[i] for i in drawn.tolist()])
    batches = [b.to(model.device) for b in evaluation_batches(encoded, packing=model.runner.takes_trees(encoded))]
    return LaidOut(name, encoded, batches, encoded.labels)


def predict_merged(model: CurveModel, adapter: Mapping[str, Tensor], splits: Sequence[LaidOut]) -> list[Predictive]:
    """Predict whole splits by one adapter of any rank: one merged evaluation."""
    with model.merger.adapter(adapter):
        return [
            predict_folded(model, s.batches, s.examples, s.encoded.scoring == "lm", s.encoded.name_of) for s in splits
        ]


def mean_loss(model: CurveModel, adapter: Mapping[str, Tensor], split: LaidOut) -> float:
    """Mean NLL (nats) of one split by one adapter of any rank."""
    (predictive,) = predict_merged(model, adapter, [split])
    return float(point_nll(predictive, _labels(split, predictive)).mean())


def _labels(split: LaidOut, predictive: Predictive) -> Tensor:
    """Labels ``[E]``; those of language modelling are the target tokens, which the predictions carry."""
    return split.labels if predictive.labels is None else predictive.labels


@dataclass(frozen=True, eq=False)
class PathScan:
    """One path: losses, hits and predictions of every split at every point."""

    name: str
    segments: int
    t: Tensor
    """[n] float64"""
    nll: dict[str, Tensor]
    """[n, E] NLL in nats, by split"""
    correct: dict[str, Tensor]
    """[n, E] bool, by split"""
    log_probs: dict[str, Tensor]
    """[n, E, C] float32, by split; empty for language modelling"""

    def segment(self, s: int) -> slice:
        """The points of segment s, both ends included."""
        steps = (len(self.t) - 1) // self.segments
        return slice(s * steps, (s + 1) * steps + 1)


@dataclass(frozen=True, eq=False)
class Scan:
    """The scan of several paths over the same rows."""

    paths: dict[str, PathScan]
    labels: dict[str, Tensor]
    """[E] by split; none for language modelling"""
    ids: dict[str, list[str]]
    """[E] by split; none for language modelling"""
    cost: dict[str, float] = field(default_factory=dict)
    """merged evaluations and the seconds they took"""

    def frame(self) -> pd.DataFrame:
        """One row for each path, split and point: path, split, t, segment, nll (nats), acc (fraction)."""
        rows = []
        for path in self.paths.values():
            for split, nll in path.nll.items():
                for i, t in enumerate(path.t.tolist()):
                    segment = min(int(t * path.segments), path.segments - 1)
                    acc = float(path.correct[split][i].double().mean())
                    rows.append((path.name, split, t, segment, float(nll[i].mean()), acc))
        return pd.DataFrame(rows, columns=["path", "split", "t", "segment", "nll", "acc"])


def scan_paths(
    model: CurveModel,
    paths: Mapping[str, Path],
    splits: Sequence[LaidOut],
    t: Mapping[str, Tensor],
    progress: Callable[[str], None] | None = None,
) -> Scan:
    """Evaluate every path at its points.

    Args:
        model: any curve on the right base and targets; only its layers are used.
        splits: rows, laid out once.
        t: the positions of each path ``[n]`` (`paths.grid`).
        progress: called after every point with the path's name.
    """
    started, count = time.perf_counter(), 0
    found = {}
    for name, path in paths.items():
        columns: dict[str, dict[str, list[Tensor]]] = {s.name: {"nll": [], "hit": [], "lp": []} for s in splits}
        for position in t[name].tolist():
            for split, predictive in zip(splits, predict_merged(model, path.adapter(position), splits), strict=True):
                labels, column = _labels(split, predictive), columns[split.name]
                column["nll"].append(point_nll(predictive, labels)[0])
                column["hit"].append(predictive.correct(labels))
                if predictive.point_log_probs is not None:
                    column["lp"].append(predictive.point_log_probs[0])
            count += 1
            if progress is not None:
                progress(name)
        found[name] = PathScan(
            name,
            path.segments,
            t[name],
            {s: torch.stack(c["nll"]) for s, c in columns.items()},
            {s: torch.stack(c["hit"]) for s, c in columns.items()},
            {s: torch.stack(c["lp"]) for s, c in columns.items() if c["lp"]},
        )
    seconds = time.perf_counter() - started
    return Scan(
        found,
        {s.name: s.labels for s in splits if s.encoded.scoring != "lm"},
        {s.name: [e.id for e in s.encoded.examples] for s in splits if s.encoded.scoring != "lm"},
        {"evaluations": count, "seconds": seconds, "seconds_per_evaluation": seconds / max(count, 1)},
    )
