"""What one reads of a run in ten seconds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.stats import binomtest

from loracurve.report import figures, frames, prediction_plots
from loracurve.report.blocks import Sheet, Tile
from loracurve.report.numbers import number, rounded
from loracurve.report.run_data import RunData
from loracurve.report.short import short, verdict
from loracurve.report.terms import terms_of


def made_run(**metrics: Any) -> RunData:
    """40 test rows, of which the 32 surest are right and of the other 8 half."""
    sure, torn = [[0.9, 0.1]] * 32, [[0.6, 0.4]] * 8
    table = pd.DataFrame({"method": "curve", "set": "test", "label": [0] * 32 + [0, 1] * 4, "probs": [*sure, *torn]})
    table["entropy"] = [-sum(p * np.log(p) for p in probs) for probs in table["probs"]]
    nll = float(np.mean([-np.log(p[y]) for p, y in zip(table["probs"], table["label"], strict=True)]))
    curve = {"passes": 2, "sets": {"test": {"examples": 40, "nll": nll}}, "t": [0.0, 1.0], "point_nll": [0.2, 0.9]}
    found = {"methods": {"curve": curve, "ensemble": {"passes": 1, "sets": {}}}, **metrics}
    return RunData("run", Path(), found, {}, {}, table, None, {})


def test_three_numbers_with_intervals() -> None:
    run = made_run()
    block = short(run)
    right, nll, surest = block.tiles
    ends = binomtest(36, 40).proportion_ci(0.95, "wilson")
    assert list(right.found.values()) == pytest.approx([0.9, ends.low, ends.high])
    assert right.shown == ("90.0 %", f"95 % interval {100 * ends.low:.1f} to {100 * ends.high:.1f} %")
    assert nll.found["estimate"] == run.metrics["methods"]["curve"]["sets"]["test"]["nll"]
    assert nll.found["low"] < nll.found["estimate"] < nll.found["high"]
    assert surest.found["estimate"] == 1.0 and surest.found["high"] == 1.0
    # Without rivals the picture is of the curve's own points, and the verdict says that there is nothing to compare.
    assert [name for name, *_ in block.figures] == ["points_and_average"]
    assert "lower than 1 of its single points (0.200 to 0.900" in verdict(run) and "compares with none" in verdict(run)


@pytest.mark.parametrize(
    ("ends", "words"), [((-0.2, -0.1), "better than"), ((-0.2, 0.1), "not distinguishable from"), ((0.1, 0.2), "worse")]
)
def test_the_verdict_is_that_of_the_interval(ends: tuple[float, float], words: str) -> None:
    low, high = ends
    found = {"estimate": (low + high) / 2, "low": low, "high": high, "distinguishable": low * high > 0}
    run = made_run(comparisons=[{"first": "curve", "second": "ensemble", "nll": found}])
    assert f"The curve (2 passes) has a test NLL {words}" in verdict(run) and "(1 pass)" in verdict(run)
    assert [name for name, *_ in short(run).figures] == ["differences"]


def difference(second: str, estimate: float, told: bool = True) -> dict[str, Any]:
    half = abs(estimate) * (0.5 if told else 2)
    found = {"estimate": estimate, "low": estimate - half, "high": estimate + half, "distinguishable": told}
    return {"first": "curve", "second": second, "nll": found}


def test_a_free_curve_is_judged_beside_its_best_point_and_the_base_model() -> None:
    run = made_run(comparisons=[difference("base model", -0.9), difference("best point", 0.01, told=False)])
    test = run.metrics["methods"]["curve"]["sets"]["test"]
    alone = {"passes": 1, "sets": {"test": {**test, "nll": 1.25}}, "t": [], "detection": {}}
    run.metrics["methods"] |= {"base model": alone, "best point": alone}
    said = verdict(run)
    assert "not distinguishable from that of its best single point, which validation rows chose (1 pass)" in said
    assert f"the curve ({test['nll']:.3f}) is better than the base model without fine-tuning (1.250)" in said
    assert "none" not in said
    # The base model would press the others into a dot: the picture is that of the points.
    assert [name for name, *_ in short(run).figures] == ["points_and_average"]
    run.metrics["comparisons"].append(difference("ensemble", -0.01))
    ((name, _, drawn),) = short(run).figures
    assert name == "differences" and [t.get_text() for t in drawn.axes[0].get_yticklabels()] == ["ensemble"]
    del run.metrics["comparisons"][1:]
    assert "lower than 1 of its single points" in verdict(run) and "base model without" in verdict(run)


def test_a_run_without_predictions_has_its_recorded_number() -> None:
    run = made_run()
    (tile,) = short(RunData("lm", Path(), run.metrics, {}, {}, None, None, {})).tiles
    assert tile.shown == (f"{tile.found['estimate']:.3f}", "")


def test_differences_stand_about_zero() -> None:
    frame = pd.DataFrame({"method": ["a", "b"], "difference": [-0.1, 0.02], "low": [-0.2, -0.01], "high": [-0.05, 0.1]})
    axes = prediction_plots.differences(frame, Figure().subplots())
    low, high = axes.get_xlim()
    assert low == -high and low < -0.2
    filled = [bars.lines[0].get_markerfacecolor() for bars in axes.containers]
    assert filled[0] != "white" and filled[1] == "white", "hollow where the interval holds 0"


def test_an_axis_of_noise_is_widened() -> None:
    axes = Figure().subplots()
    axes.plot([0, 1], [0.280, 0.296])
    figures.steady(axes)
    low, high = axes.get_ylim()
    assert high - low >= 0.2 * 0.29 and low < 0.27 and high > 0.30
    axes = Figure().subplots()
    axes.plot([0, 1], [0.97, 0.99])
    figures.steady(axes, 0.1, 0.0, top=1.0)
    assert axes.get_ylim()[1] <= 1.003 and axes.get_ylim()[1] - axes.get_ylim()[0] == pytest.approx(0.1)
    axes.set_ylim(0, 1)
    figures.steady(axes)
    assert axes.get_ylim() == (0, 1), "wide enough"


def test_wilson_is_scipys() -> None:
    rights, items = np.array([0, 3, 20, 40]), np.array([5, 20, 20, 55])
    found = np.stack(frames.wilson(rights / items, items), 1)
    ends = [binomtest(int(k), int(n)).proportion_ci(0.95, "wilson") for k, n in zip(rights, items, strict=True)]
    np.testing.assert_allclose(found, [(e.low, e.high) for e in ends], atol=1e-7)


def test_measures_are_explained_once_and_only_where_they_stand() -> None:
    said = set[str]()
    first = terms_of([Sheet("Test split", ["method", "NLL", "ECE"], [])], said)
    assert [name for name, _ in first] == ["NLL", "ECE"]
    assert [name for name, _ in terms_of([Sheet("AUROC by", ["NLL", "MI", "within points"], [])], said)] == [
        *("AUROC", "MI", "within points")
    ]


def test_digits_are_those_that_the_interval_bears() -> None:
    assert rounded({"estimate": 0.12345, "low": 0.1, "high": 0.2}, sign=False) == "0.123 [0.100, 0.200]"
    assert rounded({"estimate": 0.12345, "low": 0.1231, "high": 0.1239}) == "+0.1235 [+0.1231, +0.1239]"
    assert rounded({"estimate": 1e-5, "low": 0.0, "high": 3e-5}, sign=False) == "0.000010 [0.000000, 0.000030]"
    assert rounded({"estimate": 0.0, "low": 0.0, "high": 0.0}, sign=False) == "0.000 [0.000, 0.000]"
    assert rounded({"estimate": 250.123, "low": 249.0, "high": 251.0}, sign=False) == "250.1 [249.0, 251.0]"
    assert rounded({"estimate": 0.2, "low": None, "high": None}, sign=False) == "0.200 [–, –]"


def test_small_numbers_are_not_read_as_none() -> None:
    shown = {0.28951: "0.290", 0.0006: "0.00060", 0.000123: "0.00012", 1e-9: "0.000", -1e-9: "0.000", 0.0: "0.000"}
    shown |= {123.456: "123.5", -0.00045: "-0.00045", 0.0012: "0.001", 4e-6: "0.000004"}
    assert {value: number(value) for value in shown} == shown
    assert number(0.0004, 2) == "0.00" and number(None) == "–" and number(math.nan, missing="-") == "-"


def test_tiles_of_differences_have_a_sign() -> None:
    found = {"estimate": 0.0052, "low": 0.0001, "high": 0.011}
    tile = Tile("right answers", found, "", percent=True, difference=True)
    assert tile.shown == ("+0.52 points", "95 % interval +0.01 to +1.10 points")
    assert Tile("NLL", found, "", difference=True).shown == ("+0.005", "95 % interval +0.000 to +0.011")
