"""Barriers along paths by hand."""

from __future__ import annotations

from pathlib import Path as FilePath

import pandas as pd
import pytest
import torch
from helpers.laid_out import setting

from loracurve.landscape.barriers import barrier, barrier_frame, excess, gauge_verdicts
from loracurve.landscape.paths import anchor_paths, grid, joints
from loracurve.landscape.scan import LaidOut, scan_paths
from loracurve.system.errors import UserError


def test_barrier_arithmetic_by_hand() -> None:
    u = torch.tensor([0.0, 0.25, 0.5, 1.0])
    losses = torch.tensor([[1.0, 3.0], [2.0, 4.0], [1.0, 1.0], [4.0, 4.0]])
    # The line between the ends is 2, 2.5, 3, 4.
    torch.testing.assert_close(excess(losses.mean(1), u), torch.tensor([0.0, 0.5, -2.0, 0.0]))
    found = barrier(losses, losses + 1, u, seed=0)
    assert found.place == 1 and found.chosen == 0.5
    assert found.excess.estimate == pytest.approx(0.5) and found.above_ends == pytest.approx(-1.0)
    # Both examples exceed their own line: 2 - 1.75 and 4 - 3.25.
    assert found.excess.low == pytest.approx(0.25) and found.excess.high == pytest.approx(0.75)
    # The selection data alone choose the place; on the test data the path may lie lower there.
    other = torch.tensor([[1.0, 3.0], [0.0, 2.0], [9.0, 9.0], [4.0, 4.0]])
    found = barrier(losses, other, u, seed=0)
    assert found.place == 1 and found.excess.estimate == pytest.approx(-1.5) and found.excess.high < 0
    assert found.above_ends == pytest.approx(-3.0)
    with pytest.raises(ValueError, match="same n >= 3"):
        barrier(losses, losses[:2], u, seed=0)


def test_bootstrap_covers_a_flat_path_where_the_maximum_does_not() -> None:
    """On a path without any barrier the interval must hold 0 in 95 % of trials; one of the maximum rarely would."""
    draw = torch.Generator().manual_seed(0)
    u = torch.linspace(0, 1, 21)
    covered, naive, trials = 0, 0, 200
    for trial in range(trials):
        selection, test = (torch.randn(21, 150, generator=draw) for _ in range(2))
        found = barrier(selection, test, u, seed=trial, resamples=400)
        covered += not found.excess.distinguishable
        curve_of_means = excess(test.mean(1), u)
        naive += not barrier(test, test, u, seed=trial, resamples=400).excess.distinguishable
        assert float(curve_of_means[1:-1].max()) >= found.excess.estimate - 1e-6
    assert 0.90 <= covered / trials <= 0.985
    assert naive / trials < 0.7


def test_barriers_of_a_scan(tmp_path: FilePath) -> None:
    model, split = setting(tmp_path)
    other = LaidOut("test", split.encoded, split.batches, split.labels)
    paths = anchor_paths(joints(model.control_points(), 2), ["straight", "delta_w"], model.scalings)
    scan = scan_paths(model, paths, [split, other], {n: grid(2, 5) for n in paths})
    frame = barrier_frame(scan, "train", "test", resamples=100)
    assert list(frame["path"]) == ["straight"] * 2 + ["delta_w"] * 2 and list(frame["segment"]) == [0, 1, 0, 1]
    # Both splits hold the same rows here, so the chosen excess is the tested one.
    assert frame["chosen_excess"].tolist() == pytest.approx(frame["excess"].tolist())
    assert ((frame["t_star"] > frame["segment"] / 2) & (frame["t_star"] < (frame["segment"] + 1) / 2)).all()
    rows = scan.frame()
    assert len(rows) == 2 * 2 * 9 and rows["acc"].between(0, 1).all()
    ends = rows[(rows["t"] == 0) & (rows["split"] == "test")]["nll"].tolist()
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)
    with pytest.raises(UserError, match="other rows"):
        barrier_frame(scan, "test", "test")
    with pytest.raises(UserError, match="'validation' in the scan, found train, test"):
        barrier_frame(scan)


def barriers_of(**intervals: tuple[float, float, float]) -> pd.DataFrame:
    """A `barrier_frame` of one segment: chosen excess, low and high of each path."""
    rows = [
        {"path": n, "segment": 0, "chosen_excess": e, "excess": (low + high) / 2, "low": low, "high": high}
        for n, (e, low, high) in intervals.items()
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("verdict", "straight", "control"),
    [
        ("none", (0.02, -0.01, 0.03), (0.0, -0.01, 0.01)),
        ("gauge", (0.2, 0.15, 0.25), (0.0, -0.01, 0.01)),
        ("partly gauge", (0.2, 0.15, 0.25), (0.1, 0.05, 0.12)),
        ("not gauge", (0.2, 0.15, 0.25), (0.2, 0.14, 0.26)),
        ("undecided", (0.2, 0.02, 0.4), (0.1, -0.1, 0.3)),
    ],
)
def test_verdicts_on_the_barrier(
    verdict: str, straight: tuple[float, float, float], control: tuple[float, float, float]
) -> None:
    # The control is the path of least excess on the selection data, whatever the test rows say of the other.
    frame = barriers_of(straight=straight, delta_w=(5.0, -9.0, -8.0), procrustes=control)
    (row,) = gauge_verdicts(frame).to_dict("records")
    assert (row["verdict"], row["control"], row["segment"]) == (verdict, "procrustes", 0)
    assert "Between anchors 0 and 1 the straight line in (A, B) has " in row["sentence"]
    assert gauge_verdicts(frame[frame["path"] != "straight"]).empty
    assert gauge_verdicts(frame[frame["path"] == "straight"]).empty
