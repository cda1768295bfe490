"""The store: a folder for each cell with its predictions (Parquet) and its record (JSON), which says that it is done.

A cell's predictions.parquet has one row for each example: `set`, `id`, `label` (null without one) and `log_odds`, those
of every class but the first against the first at each point, points outermost, in steps of 1/64 and packed as `_packed`
says, and `tokens`, the length of its prompt; of tasks with more than `WIDE` classes those of the average alone, with
`expected_entropy`, `between_points` and `within_points`. Of methods whose points are averages over models around them
`expected_entropy` is the mean entropy of those, and of methods that measure it `distance` is that from the training
data. Numbers of points and classes and the weights of the points are in the file's metadata. Against steps of 1/128,
which take a seventh more room, mean NLL and mutual information move by some 1e-5, the mutual information of an example
by some 1e-4, AUROC by 1e-4 to 4e-4.

A run's file of the same name is of another form, with probabilities (`runs.evaluate.write_run_predictions`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import pad

from loracurve.bench.config import LANDSCAPE, SuiteConfig
from loracurve.bench.provenance import made_with
from loracurve.bench.suite import Cell
from loracurve.inference.predictive import Predictive
from loracurve.system.errors import UserError, one_line
from loracurve.system.files import read_json
from loracurve.system.paths import is_file
from loracurve.system.tables import read_table, write_table
from loracurve.tasks.encoding import Encoded

__all__ = ["STEPS", "WIDE", "Predictions", "read_predictions", "record_of", "write_frame", "write_cell_predictions"]


STEPS = 64  # of the stored log-odds, in one nat

WIDE = 20
"""Classes beyond which the average alone is stored and not the points: they would take as much room as a model."""

_LARGEST, _NO_CLASS = 2**15 - 1, -(2**15)

_COMPACT: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 19,
    "use_dictionary": ["set"],
    "column_encoding": {"log_odds.list.element": "BYTE_STREAM_SPLIT"},
}


@dataclass(frozen=True)
class Predictions:
    """What a cell predicts."""

    sets: dict[str, Predictive]
    labels: dict[str, Tensor]
    """[E] of the sets that have labels"""
    ids: dict[str, list[str]]
    tokens: dict[str, Tensor]
    """[E] lengths of the prompts; empty in stores from before these were kept"""


def write_cell_predictions(path: Path, sets: dict[str, Predictive], encoded: dict[str, Encoded]) -> None:
    """Write a cell's predictions.parquet, atomically.

    Raises:
        ValueError: an example without a first class to compare the others with.
    """
    found = {name: p.point_log_probs for name, p in sets.items() if p.point_log_probs is not None}
    classes = max(x.shape[2] for x in found.values())
    if wide := classes > WIDE:
        found = {name: sets[name].log_probs[None].float() for name in found}
    (points,) = {len(x) for x in found.values()}
    tables = []
    for name, log_probs in found.items():
        examples = encoded[name].examples
        if not log_probs[:, :, 0].isfinite().all():
            raise ValueError(f"{name}: an example without a first class, or of probability 0 in float32")
        log_odds = pad(log_probs - log_probs[:, :, :1], (0, classes - log_probs.shape[2]), value=-torch.inf)
        packed = _packed(log_odds[:, :, 1:].transpose(0, 1).numpy())
        column = pa.FixedSizeListArray.from_arrays(pa.array(packed.reshape(-1)), points * (classes - 1))
        labels = None if name.startswith("ood:") else [e.label for e in examples]
        columns = {
            "set": pa.array([name] * len(examples)).dictionary_encode(),
            "id": pa.array([e.id for e in examples]),
            "label": pa.array(labels or [None] * len(examples), pa.int32()),
            "log_odds": column,
            "tokens": pa.array([len(e.prompt) for e in examples], pa.int32()),
        }
        own = sets[name]
        if wide or bool(own.within_points.any()):
            columns["expected_entropy"] = pa.array(own.expected_entropy.tolist(), pa.float32())
        if wide:
            for part in ("between_points", "within_points"):
                columns[part] = pa.array(getattr(own, part).tolist(), pa.float32())
        if own.distance is not None:
            columns["distance"] = pa.array(own.distance.tolist(), pa.float32())
        tables.append(pa.table(columns))
    weights = [1.0] if wide else next(iter(sets.values())).weights.tolist()
    about = {"points": points, "classes": classes, "weights": weights}
    table = pa.concat_tables(tables, promote_options="default").unify_dictionaries()
    table = table.replace_schema_metadata({"loracurve": json.dumps(about)})
    write_table(path, table, **_COMPACT)


def _packed(log_odds: np.ndarray) -> np.ndarray:
    """[E, n, C] float -> uint16: steps, minus those of the point before, sign in the lowest bit (zigzag).

    Neighbouring points differ by little, and small numbers of either sign have a high byte of zeros.
    """
    steps = np.clip(np.rint(log_odds * STEPS), -_LARGEST, _LARGEST)
    whole = np.where(np.isneginf(log_odds), _NO_CLASS, steps).astype(np.int16)
    changes = np.diff(whole, axis=1, prepend=np.int16(0))  # modulo 2^16
    return ((changes << 1) ^ (changes >> 15)).view(np.uint16)


def _unpacked(packed: np.ndarray) -> np.ndarray:
    """What `_packed` packed, float32."""
    if packed.dtype != np.uint16:
        raise TypeError(f"expected packed log-odds, found {packed.dtype}")
    changes = (packed >> 1).astype(np.int16) ^ -(packed & 1).astype(np.int16)
    whole = np.cumsum(changes, axis=1, dtype=np.int16)
    return np.where(whole == _NO_CLASS, -np.inf, whole / STEPS).astype(np.float32)


def read_predictions(path: Path) -> Predictions:
    """Read a cell's predictions.parquet: log-probabilities of the stored log-odds."""
    table = read_table(path)
    try:
        return _predictions_in(table)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: not readable as predictions ({one_line(repr(error), 200)}); delete its folder and run again"
        ) from error


def _predictions_in(table: pa.Table) -> Predictions:
    about = json.loads(table.schema.metadata[b"loracurve"])
    names = np.asarray(table["set"].to_pylist())
    packed = table["log_odds"].combine_chunks().flatten().to_numpy()
    others = _unpacked(packed.reshape(len(names), about["points"], about["classes"] - 1))
    values = pad(torch.from_numpy(others), (1, 0))
    further = {
        name: torch.from_numpy(table[name].to_numpy(zero_copy_only=False).astype(np.float64))
        for name in ("expected_entropy", "between_points", "within_points", "distance")
        if name in table.column_names
    }
    ids, labels = table["id"].to_pylist(), table["label"].to_pylist()
    weights = torch.tensor(about["weights"], dtype=torch.float64)
    kept = "tokens" in table.column_names
    tokens = torch.from_numpy(table["tokens"].to_numpy().astype(np.int64)) if kept else None
    out = Predictions({}, {}, {}, {})
    for name in dict.fromkeys(names.tolist()):
        rows = np.flatnonzero(names == name)
        numbers = torch.from_numpy(rows)
        log_probs = values[numbers].transpose(0, 1).log_softmax(-1)
        own = {k: column[numbers] for k, column in further.items()}
        left, between = own.get("expected_entropy"), own.get("between_points")
        # What each point leaves open is known in the mean over points alone, which is all that counts.
        left = None if left is None else left.expand(len(weights), -1)
        average = replace(Predictive.from_log_probs(log_probs, weights, left), distance=own.get("distance"))
        if between is not None:
            # The difference to the entropy of rounded log-odds would be some where there is none.
            within = own.get("within_points", torch.zeros_like(between))
            average = replace(average, between_points=between, within_points=within)
        out.sets[name] = average
        out.ids[name] = [ids[i] for i in rows]
        if tokens is not None:
            out.tokens[name] = tokens[numbers]
        if labels[rows[0]] is not None:
            out.labels[name] = torch.tensor([labels[i] for i in rows])
            if not bool(((out.labels[name] >= 0) & (out.labels[name] < about["classes"])).all()):
                raise ValueError(f"labels outside the {about['classes']} classes")
    for name in ("test", "validation"):
        if name not in out.labels:
            raise ValueError(f"no labelled set {name}")
    return out


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write a data frame as Parquet, atomically."""
    write_table(path, frame)


def record_of(suite: SuiteConfig, cell: Cell, out: Path) -> dict[str, Any] | None:
    """The record of a cell that is done or has failed, None for one that is still to be run.

    Raises:
        UserError: it was made with other options.
    """
    path = cell.folder(out) / "cell.json"
    if not is_file(path):
        return None
    record: dict[str, Any] = read_json(path)
    if not _is_record(record):
        raise UserError(f"{path}: expected the record of a cell, found something else; delete its folder and run again")
    if not made_with(record["options"], suite, cell):
        remedy = "delete this folder" if cell.method == LANDSCAPE else "give the method another name"
        raise UserError(f"{path.parent}: {cell} was made with other options; {remedy} or choose another --out")
    return record


_NUMBERS = ("passes", "cost", "fit_seconds", "predict_seconds", "predicted_rows")


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("options"), dict):
        return False
    if record.get("status") == "failed":
        return isinstance(record.get("reason"), str)
    environment = record.get("environment")
    return (
        record.get("status") == "done"
        and all(isinstance(record.get(k), int | float) for k in _NUMBERS)
        and record["predicted_rows"] > 0
        and isinstance(record.get("peak_memory_bytes"), int | None)
        and isinstance(environment, dict)
        and isinstance(environment.get("device"), str)
    )
