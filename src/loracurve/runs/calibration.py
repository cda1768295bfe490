"""The calibration of a run, `calibration.json`: a temperature, prediction sets, and when to abstain.

`runs.calibrate` makes it from labelled rows, `runs.predict` uses it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from loracurve.inference.calibration import TEMPERATURES, SelectiveThreshold
from loracurve.inference.model_average import Average
from loracurve.model.curve_model import CurveModel
from loracurve.runs.run import Run
from loracurve.system.errors import UserError
from loracurve.system.files import read_json
from loracurve.system.paths import exists

__all__ = ["FORMAT", "Calibration", "Measure", "arithmetic_of", "calibration_for", "read_calibration"]


logger = logging.getLogger("loracurve")

Measure = Literal["entropy", "mutual_information"]

FORMAT = 2
"""of calibration.json; without a format (before 1) there are no tolerances, before 2 no foreign rows"""


@dataclass(frozen=True)
class Calibration:
    """What predict needs of calibration.json."""

    temperature: float
    quantile: float
    """of the prediction sets' scores"""
    measure: Measure
    selective: SelectiveThreshold
    tolerance: float = 0.0
    """by how much a tempered probability may differ between batches"""
    dtype: str | None = None
    """of the computation that the tolerances were measured in; None: there are none"""
    device: str | None = None
    """its kind"""
    points: tuple[tuple[float, ...], ...] = ()
    """place and weight of each point of the average: what the thresholds are of"""
    foreign: float | None = None
    """p-values of familiarity below this one are of foreign rows; None: none are"""
    foreign_tolerance: float = 0.0
    """by how much a distance may differ between batches"""

    @property
    def rule(self) -> dict[str, Any]:
        """When a row is answered, for those who ask: `CalibrationRule` of the server."""
        chosen = {name: getattr(self.selective, name) for name in ("threshold", "coverage", "risk", "delta")}
        return {"temperature": self.temperature, "measure": self.measure, **chosen, "foreign": self.foreign}


def read_calibration(run: Path) -> Calibration | None:
    """What `calibrate_run` wrote into a run directory; None where it has not. Raises UserError for something else."""
    path = run / "calibration.json"
    if not exists(path):
        return None
    values = read_json(path)
    try:
        version = values.get("format", 0)
        if isinstance(version, int) and version > FORMAT:
            raise UserError(
                f"{path}: expected format {FORMAT} or earlier, found {version} of a newer loracurve; "
                "update loracurve or run loracurve calibrate again"
            )
        selective, conformal = SelectiveThreshold(**values["selective"]), values["conformal"]
        made: dict[str, Any] = {}
        if version != 0:
            places, weights = values["average"]["places"], values["average"]["weights"]
            made = {
                "tolerance": float(conformal["tolerance"]),
                "dtype": str(values["rounding"]["dtype"]),
                "device": str(values["rounding"]["device"]),
                "points": tuple((*map(float, p), float(w)) for p, w in zip(places, weights, strict=True)),
            }
        if (foreign := values.get("foreign")) is not None:
            made |= {"foreign": float(foreign["alpha"]), "foreign_tolerance": float(foreign["tolerance"])}
        found = Calibration(
            float(values["temperature"]), float(conformal["quantile"]), values["measure"], selective, **made
        )
        numbers = (0 if selective.threshold is None else selective.threshold, selective.tolerance)
        sound = version in range(FORMAT + 1) and found.measure in get_args(Measure)
        sound &= TEMPERATURES[0] <= found.temperature <= TEMPERATURES[1]
        sound &= 0 <= (found.foreign or 0) < 1 and 0 <= found.foreign_tolerance < math.inf
        sound &= 0 <= found.quantile <= 1 and 0 <= found.tolerance <= 1
        if not sound or not all(isinstance(number, float | int) for number in numbers) or numbers[1] < 0:
            raise ValueError("numbers that no calibration gives")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected a calibration, found {error!r}; run loracurve calibrate again") from error
    return found


def calibration_for(run: Run, average: Average) -> Calibration | None:
    """The run's calibration, with a line in the log where its guarantees do not cover predictions by this average."""
    found = read_calibration(run.folder)
    if found is None:
        return None
    doubt = None
    if found.dtype is None:
        doubt = "it is of an older version, which did not allow for rounding"
    elif (here := arithmetic_of(run.model)) != (found.dtype, found.device):
        doubt = f"it allows for rounding in {found.dtype} on {found.device}, this is {here[0]} on {here[1]}"
    elif not average.has(found.points):
        doubt = f"it is of another average of {len(found.points)} points, this one has {len(average.weights)}"
    if doubt is not None:
        logger.warning(
            "%s: the guarantees of abstain and set do not hold: %s; run loracurve calibrate again",
            run.folder / "calibration.json",
            doubt,
        )
    return found


def arithmetic_of(model: CurveModel) -> tuple[str, str]:
    """Dtype and kind of device: what rounding depends on, and what changes when a run goes elsewhere."""
    return str(model.dtype).removeprefix("torch."), model.device.type
