"""index.json of exported points: their folders, in order, with t and weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from loracurve.system.errors import UserError
from loracurve.system.files import read_json, write_json
from loracurve.system.paths import is_folder

__all__ = ["INDEX", "read_index", "write_index"]


INDEX = "index.json"


def write_index(folder: Path, names: Sequence[str], t: Sequence[float], weights: Sequence[float]) -> None:
    """Write index.json into the folder that holds the points' folders."""
    points = zip(names, t, weights, strict=True)
    write_json(folder / INDEX, [{"folder": name, "t": time, "weight": weight} for name, time, weight in points])


def read_index(index: str | Path) -> tuple[list[str], Tensor]:
    """The names of the points' folders and their weights [n], float64.

    Args:
        index: index.json, or the folder that holds it.

    Raises:
        UserError: no such file, or something else in it.
    """
    path = Path(index)
    path = path / INDEX if is_folder(path) else path
    points = read_json(path)
    try:
        names: list[str] = [point["folder"] for point in points]
        weights = torch.tensor([float(point["weight"]) for point in points], dtype=torch.float64)
        if not all(isinstance(name, str) for name in names):
            raise TypeError("folders are named by text")
    except (ArithmeticError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: expected a list of folder, t and weight, found something else") from error
    if not names or not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1) > 1e-6:
        raise UserError(f"{path}: expected weights >= 0 with sum 1, found {weights.tolist()}")
    return names, weights
