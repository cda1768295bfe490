"""index.json of exported points: their folders, in order, with t and weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracurve.system.errors import UserError
from loracurve.system.files import read_json
from loracurve.system.paths import is_folder

__all__ = ["INDEX", "index_of", "read_index"]


INDEX = "index.json"


def index_of(t: Sequence[float], weights: Sequence[float]) -> list[dict[str, Any]]:
    """What index.json holds of points t with their weights, folder by folder.

    Raises:
        UserError: not as many weights as points, or weights that are none.
    """
    if len(t) != len(weights):
        raise UserError(f"weights: expected one for each of the {len(t)} points, found {len(weights)}")
    _check_weights(torch.tensor(weights, dtype=torch.float64), "weights")
    return [{"folder": f"point-{i:02d}", "t": t[i], "weight": weights[i]} for i in range(len(t))]


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
    _check_weights(weights, str(path))
    return names, weights


def _check_weights(weights: Tensor, where: str) -> None:
    if not len(weights) or not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1) > 1e-6:
        raise UserError(f"{where}: expected weights >= 0 with sum 1, found {weights.tolist()}")
