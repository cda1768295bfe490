"""Divergences between points of a path by hand."""

from __future__ import annotations

from pathlib import Path as FilePath

import pytest
import torch
from helpers.laid_out import setting

from loracurve.landscape.diversity import diversity_frame, information_frame, pairwise_divergence
from loracurve.landscape.paths import curve_path, grid
from loracurve.landscape.scan import scan_paths


def test_divergences_by_hand() -> None:
    one, two = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    jsd, disagreement = pairwise_divergence(torch.stack([one, two, one]))
    log2 = torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(jsd, log2 * torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]))
    torch.testing.assert_close(disagreement, torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.float64))


def test_diversity_tables(tmp_path: FilePath) -> None:
    model, split = setting(tmp_path)
    path = curve_path(model)
    scan = scan_paths(model, {"curve": path}, [split], {"curve": grid(2, 5)})
    frame = diversity_frame(scan.paths["curve"], path, points=9)
    assert len(frame) == 36 and (frame["t_i"] < frame["t_j"]).all()
    by_pair = frame.set_index(["t_i", "t_j"])["within"]
    assert by_pair[(0.0, 0.5)] and by_pair[(0.5, 1.0)] and not by_pair[(0.375, 0.625)] and by_pair[(0.125, 0.375)]
    assert (frame["distance"] > 0).all() and (frame["jsd"] >= -1e-9).all()
    information = information_frame(scan.paths["curve"], scan.labels, counts=(2, 3, 9))
    assert information["n"].tolist() == [2, 3, 9]
    two = information.iloc[0]
    ends = frame.set_index(["t_i", "t_j"]).loc[(0.0, 1.0)]
    assert two["mutual_information"] == pytest.approx(ends["jsd"], rel=1e-6)
    assert two["pairwise_jsd"] == pytest.approx(ends["jsd"], rel=1e-6)
    assert two["corrected"] == pytest.approx(2 * two["mutual_information"])
