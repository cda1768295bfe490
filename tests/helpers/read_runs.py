"""What a run directory holds, read and checked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from loracurve.inference.model_average import Average
from loracurve.model.base_model import load_base
from loracurve.model.curve_model import CurveModel
from loracurve.runs.run import Run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """What a second run has to repeat: everything but the clock."""
    return {k: v for k, v in metrics.items() if k != "seconds"}


def table(folder: Path, method: str = "curve", split: str = "test") -> dict[str, dict[str, Any]]:
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    return {r["id"]: r for r in rows if (r["method"], r["set"]) == (method, split)}


def labels_by_id(data: Path, split: str) -> dict[str, int]:
    rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
    return {row["id"]: row["label"] for row in rows}


def entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def some_ids() -> Tensor:
    """Tokens that every made tokenizer has."""
    return torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(2))


def logits(model: Any, ids: Tensor, t: float | None = None) -> Tensor:
    with torch.no_grad():
        return (model(input_ids=ids) if t is None else model.eval()(t, input_ids=ids)).logits


def peft_logits(fitted: Run, folder: Path, ids: Tensor) -> Tensor:
    """Logits of an adapter folder on the run's base, loaded by PEFT alone."""
    base, _ = load_base(fitted.config.model.name, fitted.config.task.scoring == "head", num_labels=2)
    return logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval(), ids)


def assert_consistent(row: dict[str, Any]) -> None:
    """Average and uncertainties computed again from the points and their weights."""
    p, w = torch.tensor(row["point_probs"], dtype=torch.float64), torch.tensor(row["weights"], dtype=torch.float64)
    assert p.shape[0] == len(w) and float(w.sum()) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(p.sum(1), torch.ones(len(w), dtype=torch.float64), rtol=0, atol=1e-5)
    average = w @ p
    assert sum(row["probs"]) == pytest.approx(1, abs=1e-5)
    assert row["probs"] == pytest.approx(average.tolist(), abs=1e-6)
    assert row["entropy"] == pytest.approx(float(entropy(average)), abs=1e-5)
    assert row["between_points"] == pytest.approx(row["entropy"] - float(w @ entropy(p)), abs=1e-5)
    assert row["mutual_information"] == pytest.approx(row["within_points"] + row["between_points"], abs=1e-6)
    assert row["entropy"] == pytest.approx(row["expected_entropy"] + row["mutual_information"], abs=1e-6)
    assert row["between_points"] >= -1e-9 and row["within_points"] >= -1e-6
    assert (row["within_points"] > 1e-9) <= (row["method"] == "curve"), "the others are points alone"


def point_nll(rows: dict[str, dict[str, Any]]) -> Tensor:
    """[n, E] NLL of each example at each point, from the Parquet rows."""
    return torch.tensor([[-q[r["label"]] for q in r["point_probs"]] for r in rows.values()], dtype=torch.float64).T


def log_point_nll(rows: dict[str, dict[str, Any]]) -> Tensor:
    return -(-point_nll(rows)).log()


def base_of(run: Run) -> nn.Module:
    """Its base, loaded anew."""
    return load_base(run.config.model.name, run.config.task.scoring == "head", num_labels=2)[0]


def assert_same_unknowns(run: Run, model: CurveModel, average: Average, rounding: float = 0.0) -> None:
    """The three parts of the uncertainty of the test rows, and their p-values, are those of the run.

    Args:
        rounding: by how much distances may differ: rows that are validation rows too have the same, but for it.
    """
    encoded = run.task.encode("test")
    expected, found = run.average().predict(run.model, encoded), average.predict(model, encoded)
    assert float(expected.within_points.max()) > 1e-6 and float(expected.between_points.max()) > 1e-6
    for part in ("probs", "expected_entropy", "within_points", "between_points"):
        one, other = getattr(found, part), getattr(expected, part)
        assert torch.equal(one, other) if not rounding else torch.allclose(one, other, rtol=1e-3, atol=1e-7), part
    own, theirs = run.average().unknowns, average.unknowns
    assert own is not None and own.familiarity is not None and expected.distance is not None
    assert theirs is not None and theirs.familiarity is not None and found.distance is not None
    p, q = (u.p_values(x.distance - rounding) for u, x in ((own.familiarity, expected), (theirs.familiarity, found)))
    assert torch.equal(p, q) and 0 < float(p.min()) < float(p.max())
