"""What a report is made from: the files of one run directory, or of the scan of adapters without a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from loracurve.inference.unknowns import read_unknowns
from loracurve.report.parts import THREE
from loracurve.system.errors import UserError, one_line
from loracurve.system.files import read_json
from loracurve.system.paths import is_file
from loracurve.system.shapes import Shape, check_shape
from loracurve.system.tables import read_table
from loracurve.system.yaml_files import read_yaml
from loracurve.tasks.config import Columns, TaskConfig
from loracurve.tasks.dataset import as_text
from loracurve.tasks.task import open_dataset, sized_dataset

__all__ = ["RunData", "fitting_files", "read_run", "texts_of"]


_TABLES = ("paths", "speeds", "diversity")

# What is shown of metrics.json and environment.json; they hold more.
_NUMBER = (float, None)
_FIGURES = ("acc", "nll", "brier", "ece", "mutual_information", "pairwise_jsd", "aurc_entropy", "entropy")
_SET = {"examples?": int} | {f"{n}?": _NUMBER for n in (*_FIGURES, *THREE, "disagreement")}
_METHOD = {
    "passes": int,
    "sets": {str: _SET},
    "detection": {
        str: (
            None,
            {"auroc_entropy": _NUMBER, "auroc_mi": _NUMBER, "auroc_within?": _NUMBER, "auroc_distance?": _NUMBER},
        )
    },
    "t?": ([float], None),
    "point_nll?": ([float], None),
    "tempered?": {"validation_nll?": float},
}
_INTERVAL = {"estimate": float, "low": _NUMBER, "high": _NUMBER, "distinguishable": bool}
_METRICS: Shape = {
    "methods": {str: _METHOD},
    "comparisons?": [{"first": str, "second": str, "nll": _INTERVAL, "acc?": _INTERVAL, "brier?": _INTERVAL}],
    "task": {
        "name": str,
        "kind": str,
        "scoring": str,
        "classes": [str],
        "sizes": {str: int},
        "template?": ({"prompt": str, "answer": (str, None)}, None),
        "notes?": (str, None),
        "source?": (str, None),
    },
    "average?": {"points": int, "quadrature": str, "weights": str},
    "seconds?": {str: float},
}
_ENVIRONMENT: Shape = {"device?": (str, None), "packages?": {str: (str, None)}}


@dataclass(frozen=True, eq=False)
class RunData:
    """One run: its files as they are, None or empty for what is not there."""

    name: str
    """short and unique on the page"""
    folder: Path
    metrics: dict[str, Any]
    """empty for a scan of adapters, which were not evaluated"""
    config: dict[str, Any]
    environment: dict[str, Any]
    predictions: pd.DataFrame | None
    """None for language modelling, which keeps none"""
    scan: dict[str, Any] | None
    tables: dict[str, pd.DataFrame]
    """of the scan: paths, diversity, ..."""
    known: Tensor | None = None
    """[m] distances of known rows from the training data, ascending, by which others are familiar or foreign"""

    @property
    def classes(self) -> list[str]:
        """Class names, or the letters of the options."""
        return list(self.metrics["task"]["classes"])


def read_run(folder: Path, name: str) -> RunData:
    """Read a run directory that has been evaluated, or the folder of a scan.

    Raises:
        UserError: neither, or a file that is damaged.
    """
    evaluated = is_file(folder / "metrics.json")
    scan = folder / "scan" if evaluated else folder
    if not evaluated and not is_file(scan / "scan.json"):
        raise UserError(
            f"{folder}: expected an evaluated run or the folder of a scan, found no metrics.json; "
            "make one with loracurve fit"
        )
    metrics = _mapping(read_json(folder / "metrics.json"), folder / "metrics.json") if evaluated else {}
    if evaluated:
        check_shape(metrics, _METRICS, f"{folder / 'metrics.json'}")
    found = _mapping(read_json(scan / "scan.json"), scan / "scan.json") if is_file(scan / "scan.json") else None
    tables = {n: _table(scan / f"{n}.parquet") for n in _TABLES if is_file(scan / f"{n}.parquet")}
    predictions = folder / "predictions.parquet"
    file = folder / "environment.json"
    environment = _mapping(read_json(file), file) if is_file(file) else {}
    check_shape(environment, _ENVIRONMENT, str(file))
    return RunData(
        name,
        folder,
        metrics,
        _mapping(read_yaml(folder / "config.yaml"), folder / "config.yaml") if evaluated else {},
        environment,
        _table(predictions) if evaluated and is_file(predictions) else None,
        found,
        tables if found is not None else {},
        _known(folder) if evaluated else None,
    )


def _known(folder: Path) -> Tensor | None:
    """Distances of known rows, where the run measured them."""
    found = read_unknowns(folder)
    familiarity = None if found is None else found[0].familiarity
    return None if familiarity is None or not len(familiarity.known) else familiarity.known


def _mapping(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected named entries, found {type(values).__name__}; make it again")
    return values


def _table(path: Path) -> pd.DataFrame:
    frame: pd.DataFrame = read_table(path).to_pandas()
    return frame


# What drawing and writing raise where JSON or tables lack entries or hold other types.
_MISFITS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@contextmanager
def fitting_files(folders: Sequence[Path]) -> Iterator[None]:
    """What is done with the files of runs; where they do not fit together, that is told as a UserError."""
    try:
        yield
    except UserError:
        raise
    except _MISFITS as error:
        raise UserError(
            f"{', '.join(map(str, folders))}: the files do not fit together ({one_line(repr(error), 160)}); evaluate "
            "or scan again"
        ) from error


def texts_of(run: RunData) -> dict[tuple[str, str], str]:
    """The text of every row by set and id; empty where the data set cannot be opened any more."""
    texts: dict[tuple[str, str], str] = {}
    try:
        # The columns and draws of a table are those of the fit.
        known = {f.name: run.config["task"][f.name] for f in fields(TaskConfig) if f.name in run.config["task"]}
        columns = Columns(**(known.pop("columns", None) or {}))
        dataset = sized_dataset(TaskConfig(**known, columns=columns))
        texts |= {(split, r.id): as_text(r) for split, rows in dataset.splits.items() for r in rows}
        for data in run.config.get("evaluation", {}).get("ood", []):
            other = open_dataset(data, whole=True)
            texts |= {(f"ood:{other.name}", r.id): as_text(r) for r in other.rows("test")}
    except (UserError, OSError, ImportError, ConnectionError, TypeError):
        # The page can do without: ids stand for texts.
        return texts
    return texts
