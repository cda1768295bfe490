"""What the quickstart says of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from loracurve.inference.intervals import Interval
from loracurve.report.valley import stored_valley
from loracurve.runs import quickstart
from loracurve.runs.quickstart import summary, told_apart


def difference(estimate: float, low: float, high: float) -> dict[str, Any]:
    return {"estimate": estimate, "low": low, "high": high, "distinguishable": not low <= 0 <= high}


def report(single: dict[str, Any], ensemble: dict[str, Any]) -> dict[str, Any]:
    compared = {"single adapter (mean of 3)": single, "base model": difference(-1, -2, -0.5), "ensemble": ensemble}
    sets = {"test": {"expected_entropy": 0.134}, "ambiguous": {"expected_entropy": 0.236}}
    curve = {"sets": sets, "detection": {"elements": {"auroc_distance": 0.9846}}}
    return {"comparisons": [{"second": n, "nll": d} for n, d in compared.items()], "methods": {"curve": curve}}


@pytest.mark.parametrize(("able", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_it_computes_in_what_the_processor_is_fast_in(
    able: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "multiplies_bfloat16", lambda: able)
    monkeypatch.setattr(quickstart, "smollm2_folder", lambda dtype: Path(str(dtype)))
    assert quickstart.quickstart_config().model.name == str(dtype)


def test_it_says_what_was_gained_and_what_was_not() -> None:
    lines = summary(
        report(difference(-0.064, -0.084, -0.046), difference(-0.004, -0.02, 0.01)), Interval(0.2, 0.15, 0.25)
    )
    assert lines[0] == "Against one fine-tune the curve's NLL is lower, that is better (-0.064 [-0.084, -0.046])."
    assert lines[1].endswith("it is the same as far as these words can tell (-0.004 [-0.020, +0.010]).")
    assert "AUROC 0.985" in lines[2] and "0.200 [0.150, 0.250] below" in lines[2]
    assert "0.24 nats open, clear ones 0.13" in lines[3]
    worse = summary(report(difference(0.1, 0.05, 0.2), difference(0.1, 0.05, 0.2)), Interval(0.2, 0.15, 0.25))
    assert "higher, that is worse (+0.100 [+0.050, +0.200])" in worse[0]


def test_element_names_are_told_by_distance_and_by_the_ensemble_s_entropy(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    known, foreign = torch.randn(60, generator=draw), torch.randn(40, generator=draw) + 1
    rows = []
    for method, shift in (("curve", 5.0), ("ensemble", 0.0)):
        values = torch.cat([known, foreign + shift]).tolist()
        sets = ["test"] * 60 + ["elements"] * 40
        rows += [{"method": method, "set": s, "distance": v, "entropy": v} for s, v in zip(sets, values, strict=True)]
    pd.DataFrame(rows).sample(frac=1, random_state=0, ignore_index=True).sort_values("method").to_parquet(
        tmp_path / "predictions.parquet"
    )
    found = told_apart(tmp_path)
    pairs = (foreign[:, None] > known[None]).double().mean()  # the AUROC is the share of pairs in the right order
    assert found.estimate == pytest.approx(1 - float(pairs)) and found.low < found.estimate < found.high


def test_the_stored_valley_has_a_barrier_and_a_valley() -> None:
    found = stored_valley()
    assert max(found["line"]["nll"]) > 0.2 and max(map(abs, found["curve"]["nll"])) < 0.02 and found["average"] < 0
    assert all(len(found[name]["x"]) == len(found[name]["nll"]) for name in ("line", "curve"))
