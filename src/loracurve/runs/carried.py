"""What a run knows of unknown inputs, carried along with its exported points or its shared curve.

Gaussians and familiarity are numbers of certain adapters on a certain base; beside others they would be wrong without a
word. So unknowns.json has two more entries there: `belongs`, hashes of the files beside it, and `sha256`, of its own.
They guard against mistakes: whoever changes a folder on purpose can change the hashes too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loracurve.curve.anchored import slot_times
from loracurve.curve.files import FILES as CURVE_FILES
from loracurve.curve.files import load_adapter
from loracurve.curve.hub import UNKNOWNS, curve_folder
from loracurve.curve.index import INDEX, read_index
from loracurve.inference.model_average import Average
from loracurve.inference.unknowns import Unknowns, read_unknowns, write_unknowns
from loracurve.model.curve_model import CurveModel
from loracurve.model.fingerprint import compare_fingerprint
from loracurve.system.errors import UserError
from loracurve.system.files import file_hash, read_json, write_json
from loracurve.system.paths import is_file
from loracurve.system.shapes import Shape, check_shape
from loracurve.training.checkpoint import checksum

__all__ = ["carried_unknowns", "carry_unknowns", "open_average"]


_JSON, _TENSORS = UNKNOWNS

_POINT_FILES = ("adapter_config.json", "adapter_model.safetensors")

_NAMES = {"base_model_name_or_path", "revision", "name"}
"""entries of configs that say where the base is, which may change"""

_SHAPE: Shape = {"belongs": {"files": {str: str}, "base": {}}, "sha256": str}


def carry_unknowns(
    unknowns: Unknowns,
    points: Sequence[Sequence[float]],
    folder: Path,
    index: Sequence[Mapping[str, Any]] | None = None,
    base: Mapping[str, Any] | None = None,
) -> None:
    """Write a run's unknowns into a folder of exported points or of a curve, which are there already.

    Args:
        unknowns: of the run's average.
        points: place and weight of each of its points.
        folder: where the points or the curve are.
        index: of exported points, what index.json is going to hold.
        base: of exported points, the fingerprint of their base; a curve has its own.
    """
    write_unknowns(unknowns, points, folder)
    belongs = {"files": _hashes(folder, index), "base": dict(base or {})}
    values = read_json(folder / _JSON) | {"belongs": belongs}
    write_json(folder / _JSON, values | {"sha256": checksum(values)})


def carried_unknowns(folder: Path) -> tuple[Unknowns, list[tuple[float, ...]]] | None:
    """What `carry_unknowns` wrote: the unknowns, and place and weight of each of their points; None where there is
    nothing.

    Raises:
        UserError: they do not belong to the files beside them, or one of these has been changed.
    """
    path = folder / _JSON
    if not is_file(path):
        return None
    values = read_json(path)
    check_shape(values, _SHAPE, str(path))
    again = "export or share the run again"
    if values["sha256"] != checksum(values):
        raise UserError(f"{path}: expected what loracurve wrote, found it changed; {again}")
    index = None
    if is_file(folder / INDEX):
        read_index(folder)  # or it is refused
        index = read_json(folder / INDEX)
    known, found = values["belongs"]["files"], _hashes(folder, index)
    for name in [*found, *sorted(known.keys() - found.keys())]:
        if known.get(name) != found.get(name):
            raise UserError(f"{path}: expected the {name} that it was made with, found another or none; {again}")
    return read_unknowns(folder)


def open_average(
    folder: str | Path, base: nn.Module | str | None = None, revision: str | None = None
) -> tuple[CurveModel, Average]:
    """Open the points that `loracurve export` wrote, or a curve that `loracurve share` did, with what goes along.

    Args:
        folder: with index.json or curve_config.json; a curve may be OWNER/NAME on the hub.
        base: the base model or its name. None: the one that the files name.
        revision: branch, tag or commit on the hub.

    Returns:
        The model, and the average of its points: `average.predict(model, encoded)`. Where the run knew something of
        unknown inputs, with the three parts of the uncertainty, and p-values of the distances in
        `average.unknowns.familiarity`.

    Raises:
        UserError: files that are damaged or do not belong together, another base, a single point, or a curve without
            unknowns, whose files do not say which points to average.
    """
    place = curve_folder(folder, revision)
    found = carried_unknowns(place)
    if not is_file(place / INDEX):
        model = CurveModel.from_pretrained(place, base)
        if found is None:
            raise UserError(
                f"{folder}: expected {_JSON}, which says which points to average, found none; choose them with "
                "CurveModel.from_pretrained and predict_split"
            )
        return model, _average_of(*found, model.spec.size, place / _JSON)
    names, weights = read_index(place)
    folders = [place / name for name in _within(names, place)]
    if len(folders) < 2:
        raise UserError(f"{folder}: expected several points, found one, an adapter; load {folders[0]} in PEFT")
    if base is None and (base := load_adapter(folders[0])[0].base_model_name_or_path) is None:
        raise UserError(f"{folders[0]} does not name its base model; pass base=")
    model = CurveModel.with_adapters(base, folders)
    average = Average(slot_times(len(names)), weights)
    if found is None:
        return model, average
    unknowns, points = found
    if [point[-1:] for point in points] != [(weight,) for weight in weights.tolist()]:
        raise UserError(f"{place / _JSON}: expected the weights of {INDEX}, found others; export the run again")
    known = read_json(place / _JSON)["belongs"]["base"]
    if known and (differs := compare_fingerprint(known, model.model)) is not None:
        raise UserError(f"{folder}: expected the base that the points were trained on, found another: {differs}")
    return model, replace(average, unknowns=unknowns)


def _average_of(unknowns: Unknowns, points: list[tuple[float, ...]], control_points: int, path: Path) -> Average:
    """The points that unknowns are of: t on the curve, or coefficients of its control points."""
    width = len(points[0]) if points else 0
    table = torch.tensor(points if all(len(p) == width for p in points) else [], dtype=torch.float64)
    sound = width in (2, control_points + 1) and len(table) > 0
    sound = sound and bool((table[:, -1] >= 0).all()) and abs(float(table[:, -1].sum()) - 1) < 1e-6
    if not sound or (width == 2 and not bool(((table[:, 0] >= 0) & (table[:, 0] <= 1)).all())):
        raise UserError(f"{path}: expected places and weights of points of this curve, found others; share it again")
    where, weights = table[:, :-1], table[:, -1]
    if width == 2:
        return Average(where[:, 0], weights, unknowns=unknowns)
    return Average(torch.zeros(len(weights)), weights, coefficients=where, unknowns=unknowns)


def _within(names: Sequence[str], folder: Path) -> Sequence[str]:
    """Names of folders; raises UserError for those that lead out of their own."""
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{folder / INDEX}: expected names of folders beside it, found {name[:100]!r}")
    return names


def _hashes(folder: Path, index: Any) -> dict[str, str]:
    """SHA-256 of what unknowns belong to, by file: the curve, or where there is an index the points in it."""
    if index is None:
        return {name: _hash(folder / name) for name in (*CURVE_FILES, _TENSORS) if is_file(folder / name)}
    points = _within([point["folder"] for point in index], folder)
    names = [*(f"{point}/{name}" for point in points for name in _POINT_FILES), _TENSORS]
    return {INDEX: checksum({"points": index})} | {name: _hash(folder / name) for name in names}


def _hash(path: Path) -> str:
    """Of a file's bytes; of a config, of what it says but for the place of its base."""
    if path.name.endswith("_config.json"):
        return checksum(_nameless(read_json(path)))
    return file_hash(path, f"a file that {_JSON} belongs to")


def _nameless(values: Any) -> Any:
    """A config without where its base is."""
    if not isinstance(values, dict):
        return values
    return {key: _nameless(value) for key, value in values.items() if key not in _NAMES}
