"""What a curve does not know: Gaussians at its points and the distance from its training data, in one pass.

Both look at the last hidden states that a prediction computes anyway. They are built once, from training rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracurve.inference.config import UnknownsConfig
from loracurve.inference.familiarity import Familiarity, Inverse, balanced, fit_familiarity
from loracurve.inference.hidden_states import SplitStates, states_of
from loracurve.inference.laplace import (
    LARGEST_TAU,
    SMALLEST_TAU,
    Gaussians,
    fit_gaussians,
    marginal_tau,
    validation_tau,
)
from loracurve.inference.prediction import Read, Way, predict_splits
from loracurve.inference.predictive import Predictive
from loracurve.model.curve_model import CurveModel
from loracurve.model.states import States
from loracurve.system.errors import UserError
from loracurve.system.files import read_json, write_json
from loracurve.system.paths import is_file
from loracurve.system.shapes import check_shape
from loracurve.system.tensors import read_tensors, write_tensors
from loracurve.tasks.batching import Batch
from loracurve.tasks.dataset import subset
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import Task

__all__ = ["Unknowns", "fit_unknowns", "read_unknowns", "training_rows", "write_unknowns"]

logger = logging.getLogger("loracurve")

_MOST_TOKENS = 20_000
"""Target tokens of language modelling whose states are kept."""


@dataclass(frozen=True)
class Unknowns:
    """Gaussians and familiarity at n points; a reader of predictions there."""

    gaussians: Gaussians | None
    familiarity: Familiarity | None
    on_base: bool = False
    """whether familiarity looks at the untouched base's state, which is then run as one point more; it alone where
    familiarity is of one point, else beside the curve's points"""

    def read(self, log_probs: Tensor, states: States, batch: Batch) -> Read:
        """As `prediction.Reader`."""
        distance = None
        if self.familiarity is not None:
            alone = self.on_base and len(self.familiarity.weights) == 1
            distance = self.familiarity.distance(states.at(slice(-1, None)) if alone else states)
        base = None
        if self.on_base:
            states, log_probs, base = states.at(slice(-1)), log_probs[:-1], log_probs[-1:]
        read = Read(log_probs) if self.gaussians is None else self.gaussians.read(log_probs, states, batch)
        return replace(read, distance=distance, base_log_probs=base)

    def predict(
        self,
        model: CurveModel,
        splits: Mapping[str, Encoded],
        t: Tensor,
        weights: Tensor | None = None,
        way: Way = "auto",
    ) -> dict[str, Predictive]:
        """`predict_splits` at the points that this was built for, with its three parts of uncertainty and distances."""
        return predict_splits(model, splits, self.places(model, t), weights, way, self)

    def places(self, model: CurveModel, t: Tensor) -> Tensor:
        """Where to predict: t [n], and the base as one more where it is wanted, [n + 1, K] coefficients."""
        return _with_base(model, t) if self.on_base else t


def _with_base(model: CurveModel, t: Tensor) -> Tensor:
    """Coefficients of 0 are adapters of 0: the base."""
    c = t if t.dim() == 2 else model.coefficients(t)
    return torch.cat([c, c.new_zeros(1, c.shape[1])])


def training_rows(task: Task, most: int) -> tuple[Encoded, int]:
    """At most so many rows of a task's training split, drawn by the hash of their ids, and how many there are."""
    every = task.dataset.rows("train")
    encoded = task.encode("train")
    if len(every) <= most:
        return encoded, len(every)
    drawn = {row.id for row in subset(every, most)}
    return replace(encoded, examples=[e for e in encoded.examples if e.id in drawn]), len(every)


def fit_unknowns(
    model: CurveModel,
    train: Encoded,
    validation: Encoded,
    t: Tensor,
    weights: Tensor | None,
    config: UnknownsConfig,
    total: int | None = None,
) -> Unknowns:
    """Build both from rows of the training and validation splits.

    Args:
        model: with a curve.
        train: rows of the training split, at most as many as `config.rows`.
        validation: rows that were not trained on.
        t: the points of the average [n], or coefficients [n, K]; weights: theirs [n].
        config: options.
        total: rows that were trained on; those of `train` if None.

    Raises:
        UserError: as `fit_gaussians` and `fit_familiarity`; where only the Gaussians cannot be had, they are left out
            with a line in the log, if `config.gaussians` is `auto`.
    """
    on_base = config.familiarity in ("base", "both")
    where = _with_base(model, t) if on_base else t
    states, known = states_of(model, train, where), states_of(model, validation, where)
    own = slice(-1) if on_base else slice(None)
    gaussians = None
    if config.gaussians != "none":
        try:
            gaussians = _gaussians(model, train, states.at(own), known.at(own), t, weights, config, total)
        except UserError as error:
            if config.gaussians != "auto":
                raise
            logger.warning("without Gaussians: %s", error)
    familiarity = None
    if config.familiarity != "none":
        of = slice(-1, None) if config.familiarity == "base" else slice(None)
        familiarity = _familiarity(train, states.at(of), known.at(of), weights, config)
    return Unknowns(gaussians, familiarity, on_base)


def _gaussians(
    model: CurveModel,
    train: Encoded,
    states: SplitStates,
    known: SplitStates,
    t: Tensor,
    weights: Tensor | None,
    config: UnknownsConfig,
    total: int | None,
) -> Gaussians:
    size = states.states.read.shape[-1]
    rows = torch.zeros(len(t), 1, size + 1)
    if states.states.choices is None and train.scoring != "lm":
        rows = model.runner.last_rows(t, train.answer_ids, size)
    found = fit_gaussians(states, rows, total)
    if config.tau > 0:
        return found.narrowed(min(max(config.tau, SMALLEST_TAU), LARGEST_TAU))
    if config.rule == "marginal" and found.form != "choices":
        return found.narrowed(marginal_tau(found))
    return found.narrowed(validation_tau(found, known, weights))


def _familiarity(
    train: Encoded, states: SplitStates, known: SplitStates, weights: Tensor | None, config: UnknownsConfig
) -> Familiarity:
    # Choices of a row's own are no classes that rows share.
    shared = train.scoring in ("head", "answer") and all(e.n_choices == len(train.classes) for e in train.examples)
    if train.scoring == "lm":
        states, known = (_thinned(s) for s in (states, known))
    classes = len(train.classes) if shared else 0
    own = weights if config.familiarity == "curve" else None
    found = fit_familiarity(states, own, classes, config.measure)
    if config.familiarity == "both":
        found = balanced(found, known.states, weights)
    return replace(found, known=found.distance(known.states).cpu().sort().values)


def _thinned(states: SplitStates) -> SplitStates:
    step = -(-len(states) // _MOST_TOKENS)
    return states.index(torch.arange(0, len(states), step))


FORMAT = 1
"""of unknowns.json"""

_TENSORS = {
    "gaussians": ("values", "vectors", "class_values", "class_vectors", "squares"),
    "familiarity": ("means", "centre", "weights", "nearest", "known"),
}


def write_unknowns(
    unknowns: Unknowns, average: Sequence[Sequence[float]], folder: Path, curve: str | None = None
) -> None:
    """Write unknowns.safetensors, and then unknowns.json, which says what is in it.

    Args:
        average: place and weight of each point that they were built for.
        folder: of the run.
        curve: SHA-256 of the run's control points.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {
        "format": FORMAT,
        "average": [list(point) for point in average],
        "on_base": unknowns.on_base,
    }
    if curve is not None:
        values["curve"] = curve
    if (gaussians := unknowns.gaussians) is not None:
        tensors |= {f"gaussians.{name}": getattr(gaussians, name) for name in _TENSORS["gaussians"]}
        names = ("form", "classes", "bias", "rows", "of", "tau")
        values["gaussians"] = {name: getattr(gaussians, name) for name in names}
    if (familiarity := unknowns.familiarity) is not None:
        tensors |= {f"familiarity.{name}": getattr(familiarity, name) for name in _TENSORS["familiarity"]}
        for part in ("within", "whole"):
            tensors |= {f"familiarity.{part}.{k}": v for k, v in vars(getattr(familiarity, part)).items()}
        values["familiarity"] = {"measure": familiarity.measure, "rows": familiarity.rows}
    write_tensors(folder / "unknowns.safetensors", tensors)
    write_json(folder / "unknowns.json", values)


def read_unknowns(folder: Path) -> tuple[Unknowns, list[tuple[float, ...]]] | None:
    """What `write_unknowns` wrote, and the points that it is of; None where there is nothing.

    Raises:
        UserError: something else, or of a newer version.
    """
    path = folder / "unknowns.json"
    if not is_file(path):
        return None
    values = read_json(path)
    check_shape(values, _SHAPE, str(path))
    if values["format"] > FORMAT:
        raise UserError(f"{path}: expected format {FORMAT}, found {values['format']} of a newer loracurve; update it")
    tensors = read_tensors(folder / "unknowns.safetensors")
    points = len(values["average"])
    try:
        gaussians = familiarity = None
        if (about := values.get("gaussians")) is not None:
            own: dict[str, Any] = {name: tensors[f"gaussians.{name}"] for name in _TENSORS["gaussians"]}
            gaussians = Gaussians(**own, **about)
            gaussians.check(points)
        if (about := values.get("familiarity")) is not None:
            own = {name: tensors[f"familiarity.{name}"] for name in _TENSORS["familiarity"]}
            for part in ("within", "whole"):
                own[part] = Inverse(*(tensors[f"familiarity.{part}.{k}"] for k in ("vectors", "values", "floor")))
            familiarity = Familiarity(**own, **about)
            alone = values["on_base"] and len(familiarity.weights) == 1
            familiarity.check(1 if alone else points + values["on_base"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: expected what loracurve fit writes, found {error}; run loracurve calibrate"
        ) from error
    return Unknowns(gaussians, familiarity, values["on_base"]), [tuple(map(float, p)) for p in values["average"]]


_SHAPE: Any = {
    "format": int,
    "average": [[float]],
    "on_base": bool,
    "curve?": str,
    "gaussians?": {"form": str, "classes": int, "bias": bool, "rows": int, "of": int, "tau": float},
    "familiarity?": {"measure": str, "rows": int},
}
