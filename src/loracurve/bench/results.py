"""What a suite found, read from its store: figures of every cell and set, and values for each example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.lines import Line
from loracurve.bench.config import LANDSCAPE, SuiteConfig
from loracurve.bench.registry import method_name
from loracurve.bench.retired import RetiredCurve
from loracurve.bench.statistics import counts_above_chance
from loracurve.bench.store import WIDE, Predictions, read_predictions, record_of, write_frame
from loracurve.bench.suite import Cell, cells_of, full_ensemble, method_of, scans_of
from loracurve.curve.anchored import slot_times
from loracurve.inference import metrics
from loracurve.inference.calibration import apply_temperature, fit_temperature
from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.predictive import Predictive
from loracurve.system.randomness import stream_seed

__all__ = [
    "CellResult",
    "Results",
    "mean_of",
    "read_results",
    "references_of",
    "seed_of",
    "several_models",
    "shared_seeds",
    "stacked",
    "write_metrics",
]


_OF_SEVERAL_POINTS = ("pairwise_jsd", "disagreement")

_OF_SEVERAL_MODELS = ("mutual_information", "_mi")


@dataclass(frozen=True, eq=False)
class CellResult:
    """A cell that is done."""

    cell: Cell
    record: Mapping[str, Any]
    predictions: Predictions
    resampled: dict[tuple[str, str, str], tuple[float | None, Tensor]] = field(default_factory=dict)
    """measures over resamples by set, score and measure, kept for `tables.detection`, which needs them often"""

    @property
    def test(self) -> Predictive:
        return self.predictions.sets["test"]

    @property
    def keeps_points(self) -> bool:
        """Whether all points are stored; of more than `WIDE` classes it is their average alone."""
        found = self.test.point_log_probs
        return found is not None and (found.shape[-1] <= WIDE or self.record["passes"] == 1)

    def points(self, name: str) -> Tensor:
        """``[n, E, C]`` log-probabilities at each point; the average ``[1, E, C]`` where points are not kept."""
        found = self.predictions.sets[name].point_log_probs
        assert found is not None
        return found

    def point_nll(self, name: str) -> Tensor:
        """``[n, E]`` NLL of each example of a set at each point."""
        return negative_log_likelihood(self.points(name).double(), self.predictions.labels[name])

    @cached_property
    def temperature(self) -> float:
        """T of the average, from the validation rows."""
        return fit_temperature(self.predictions.sets["validation"].log_probs, self.predictions.labels["validation"])

    @cached_property
    def tempered(self) -> Tensor:
        """``[E, C]`` log-probabilities of the test rows, tempered."""
        return apply_temperature(self.test.log_probs, self.temperature)

    @cached_property
    def per_example(self) -> dict[str, Tensor]:
        """Values ``[E]`` for each test example: acc, nll, brier, nll_ts, brier_ts (the last two after tempering)."""
        labels = self.predictions.labels["test"]
        return {
            "acc": self.test.correct(labels).double(),
            "nll": self.test.negative_log_likelihood(labels),
            "brier": metrics.brier_per_example(self.test.probs, labels),
            "nll_ts": negative_log_likelihood(self.tempered, labels),
            "brier_ts": metrics.brier_per_example(self.tempered.exp(), labels),
        }

    @cached_property
    def figures(self) -> dict[str, dict[str, Any]]:
        """Figures by set, each with ``undefined``: `classification_summary` and the same after tempering for labelled
        sets, uncertainties and `detection_summary` for the others."""
        out: dict[str, dict[str, Any]] = {}
        for name, predictive in self.predictions.sets.items():
            labels = self.predictions.labels.get(name)
            if labels is None:
                found = {k: getattr(predictive, k).mean().item() for k in ("entropy", "expected_entropy")}
                found |= {k: getattr(predictive, k).mean().item() for k in ("mutual_information", *_OF_SEVERAL_POINTS)}
                found |= metrics.detection_summary(self.test, predictive)
            else:
                found = metrics.classification_summary(predictive, labels)
                probs = apply_temperature(predictive.log_probs, self.temperature).exp()
                found |= {
                    "nll_ts": metrics.negative_log_likelihood(probs, labels),
                    "brier_ts": metrics.brier(probs, labels),
                    "ece_ts": metrics.expected_calibration_error(probs, labels),
                    "temperature": self.temperature,
                }
            # A zero would read as a finding.
            unknown = [*(_OF_SEVERAL_POINTS if len(predictive.weights) == 1 else ())]
            unknown += [] if several_models(predictive) else _OF_SEVERAL_MODELS
            for key in [k for k in found if k.endswith(tuple(unknown))]:
                found[key] = None
                found["undefined"][key] = "one point"
            out[name] = found
        return out


@dataclass(frozen=True)
class Results:
    """All cells of a suite."""

    suite: SuiteConfig
    done: dict[Cell, CellResult]
    failed: dict[Cell, str]
    """with the reason"""
    missing: list[Cell]
    scans: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    """records of the scans of anchors that are done"""

    def seeds(self, task: str, method: str) -> list[CellResult]:
        """The cells of a method on a task that are done, in the order of the seeds."""
        cells = [Cell(task, seed, method) for seed in self.suite.seeds]
        return [self.done[c] for c in cells if c in self.done]

    def each(self) -> list[tuple[str, str, list[CellResult]]]:
        """Every task and method of which some seed is done, with its cells."""
        methods = list(dict.fromkeys([*self.suite.methods, full_ensemble(self.suite)]))
        pairs = [(t, m, self.seeds(t, m)) for t in self.suite.tasks for m in methods]
        return [p for p in pairs if p[2]]

    def singles(self, task: str) -> tuple[float, bool] | None:
        """Mean test accuracy of single anchors, and whether the data set counts by it; None without anchors.

        Where only averages are stored: of the method `single`, or of the ensemble where it takes no part.
        """
        whole = self.seeds(task, full_ensemble(self.suite))
        if not whole:
            return None
        if not whole[0].keeps_points:
            one = next((n for n, m in self.suite.methods.items() if method_name(m) == "single"), None)
            whole = (one and self.seeds(task, one)) or whole
        labels = whole[0].predictions.labels["test"]
        correct = torch.stack([r.points("test").argmax(-1) == labels for r in whole])
        accuracy = correct.double().mean().item()
        return accuracy, counts_above_chance(accuracy, labels)

    @property
    def counting(self) -> list[str]:
        """The data sets that count (`singles`)."""
        return [t for t in self.suite.tasks if (judged := self.singles(t)) and judged[1]]

    def counted_sets(self) -> str:
        """How many of them there are, in words."""
        count = len(self.counting)
        return "data set that counts" if count == 1 else f"{count} data sets that count"

    def scans_by_task(self) -> dict[str, list[tuple[Cell, Mapping[str, Any]]]]:
        """The scans that are done, by task in the suite's order, with their records."""
        found: dict[str, list[tuple[Cell, Mapping[str, Any]]]] = {}
        for cell, record in self.scans.items():
            found.setdefault(cell.task, []).append((cell, record))
        return found

    def positions(self, done: list[CellResult]) -> list[float] | None:
        """t of the stored points of a line or curve; None for other methods, and for samples off the curve."""
        method, first = method_of(self.suite, done[0].cell.method), done[0]
        if not first.keeps_points:
            return None
        if isinstance(method, Line):
            return slot_times(len(first.test.weights)).tolist()
        if isinstance(method, Curve) and method.inference == "curve":
            found: list[float] = first.record["notes"]["average"]["t"]
            return found
        return None

    def anchors_of(self, method: str) -> int:
        """How many of the shared anchors a path runs through; 0 for a free curve, anchors of its own, other methods."""
        options = method_of(self.suite, method)
        if isinstance(options, Line):
            return options.anchors
        if not isinstance(options, Curve):
            return 0
        own_anchors = isinstance(options, RetiredCurve) and options.own_anchors
        return 0 if own_anchors or options.curve.kind == "free" else int(options.curve.anchors)

    def figure(self, task: str, method: str, where: str, name: str) -> float | None:
        """Mean over seeds of a figure; None where it is undefined for all."""
        found = [r.figures.get(where, {}).get(name) for r in self.seeds(task, method)]
        known = [v for v in found if v is not None]
        return sum(known) / len(known) if known else None


def read_results(suite: SuiteConfig, out: Path) -> Results:
    """Read what is there of a suite; raises UserError for cells made with other options."""
    done, failed, missing, scans = {}, {}, [], {}
    for cell in [*cells_of(suite), *scans_of(suite)]:
        record = record_of(suite, cell, out)
        if record is None:
            missing.append(cell)
        elif record["status"] == "failed":
            failed[cell] = record["reason"]
        elif cell.method == LANDSCAPE:
            scans[cell] = record
        else:
            done[cell] = CellResult(cell, record, read_predictions(cell.folder(out) / "predictions.parquet"))
    return Results(suite, done, failed, missing, scans)


def write_metrics(results: Results, path: Path) -> pd.DataFrame:
    """Write metrics.parquet, one row for each cell, set and figure; `reason` says why a value is missing."""
    rows = [
        (cell.task, cell.seed, cell.method, where, name, value, figures["undefined"].get(name))
        for cell, result in results.done.items()
        for where, figures in result.figures.items()
        for name, value in figures.items()
        if name != "undefined"
    ]
    frame = pd.DataFrame(rows, columns=["task", "seed", "method", "set", "metric", "value", "reason"])
    frame["value"] = frame["value"].astype("float64")
    write_frame(frame, path)
    return frame


def stacked(results: list[CellResult], name: str) -> Tensor:
    """``[E]``: a value of each test example, averaged over seeds."""
    return torch.stack([r.per_example[name] for r in results]).mean(0)


def mean_of(done: list[CellResult], key: str) -> float:
    """Mean over cells of a number in their records."""
    return float(sum(r.record[key] for r in done) / len(done))


def references_of(suite: SuiteConfig) -> list[str]:
    """The methods that others are compared with."""
    if suite.references:
        return suite.references
    five = [n for n, m in suite.methods.items() if m == Ensemble(5)]
    return list(dict.fromkeys([*five[:1], full_ensemble(suite)]))


def shared_seeds(first: list[CellResult], second: list[CellResult]) -> tuple[list[CellResult], list[CellResult]]:
    """The cells of both whose seeds are done in both, in the same order."""
    seeds = {r.cell.seed for r in first} & {r.cell.seed for r in second}
    return [r for r in first if r.cell.seed in seeds], [r for r in second if r.cell.seed in seeds]


def several_models(predictive: Predictive) -> bool:
    """Whether an average is of more than one model: of several points, or of models around one."""
    return len(predictive.weights) > 1 or bool((predictive.mutual_information.abs() > 1e-9).any())


def seed_of(task: str, what: str) -> int:
    """Seed of the resamples of a task's rows."""
    return stream_seed(0, "bench", task, what) % 2**31
