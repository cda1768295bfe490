"""What a report is made from: the files of one run directory, or of the scan of adapters without a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from loracurve.system.errors import UserError
from loracurve.system.files import read_json
from loracurve.system.tables import read_table
from loracurve.system.yaml_files import read_yaml
from loracurve.tasks.dataset import as_text
from loracurve.tasks.task import open_dataset

__all__ = ["RunData", "read_run", "texts_of"]


_TABLES = ("paths", "speeds", "diversity")


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

    @property
    def classes(self) -> list[str]:
        """Class names, or the letters of the options."""
        return list(self.metrics["task"]["classes"])


def read_run(folder: Path, name: str) -> RunData:
    """Read a run directory that has been evaluated, or the folder of a scan.

    Raises:
        UserError: neither, or a file that is damaged.
    """
    evaluated = (folder / "metrics.json").is_file()
    scan = folder / "scan" if evaluated else folder
    if not evaluated and not (scan / "scan.json").is_file():
        raise UserError(
            f"{folder}: expected an evaluated run or the folder of a scan, found no metrics.json; "
            "make one with loracurve fit"
        )
    metrics = _mapping(read_json(folder / "metrics.json"), folder / "metrics.json") if evaluated else {}
    for key in ("methods", "task") if evaluated else ():
        if key not in metrics:
            raise UserError(f"{folder}/metrics.json: expected the entry {key!r} of a fitted run, found none")
    found = _mapping(read_json(scan / "scan.json"), scan / "scan.json") if (scan / "scan.json").is_file() else None
    tables = {n: _table(scan / f"{n}.parquet") for n in _TABLES if (scan / f"{n}.parquet").is_file()}
    predictions = folder / "predictions.parquet"
    environment = folder / "environment.json"
    return RunData(
        name,
        folder,
        metrics,
        _mapping(read_yaml(folder / "config.yaml"), folder / "config.yaml") if evaluated else {},
        _mapping(read_json(environment), environment) if environment.is_file() else {},
        _table(predictions) if evaluated and predictions.is_file() else None,
        found,
        tables if found is not None else {},
    )


def _mapping(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected named entries, found {type(values).__name__}; make it again")
    return values


def _table(path: Path) -> pd.DataFrame:
    frame: pd.DataFrame = read_table(path).to_pandas()
    return frame


def texts_of(run: RunData) -> dict[tuple[str, str], str]:
    """The text of every row by set and id; empty where the data set cannot be opened any more."""
    texts: dict[tuple[str, str], str] = {}
    try:
        dataset = open_dataset(run.config["task"]["data"], run.config["task"].get("seed", 0))
        texts |= {(split, r.id): as_text(r) for split, rows in dataset.splits.items() for r in rows}
        for data in run.config.get("evaluation", {}).get("ood", []):
            other = open_dataset(data)
            texts |= {(f"ood:{other.name}", r.id): as_text(r) for r in other.rows("test")}
    except (UserError, OSError, ImportError, ConnectionError):
        # The page can do without: ids stand for texts.
        return texts
    return texts
