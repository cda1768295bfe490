"""Paths are drawn in order."""

from __future__ import annotations

import numpy as np
from helpers.made_frames import lines, path_frame
from matplotlib.figure import Figure

from loracurve.landscape.config import PATHS
from loracurve.report import plots
from loracurve.report.looks import RUN


def test_path_is_drawn_in_order_and_marks_its_anchors() -> None:
    frame = path_frame().sample(frac=1, random_state=0)
    axes = plots.paths(frame, Figure().subplots(), anchors=[0.0, 0.5, 1.0])
    t = np.linspace(0, 1, 11)
    np.testing.assert_array_equal(lines(axes)["curve"], np.stack([t, -t], 1))
    np.testing.assert_array_equal(lines(axes)["straight (A, B)"], np.stack([t, t * (1 - t)], 1))
    vertical = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]  # type: ignore[index, arg-type]
    assert vertical == [0.0, 0.5, 1.0]
    np.testing.assert_array_equal(lines(axes)["adapters"], [[0, 0], [0.5, 0], [1, 0]])
    assert axes.get_ylabel() == "test NLL (nats)"


def test_a_path_looks_the_same_whatever_else_is_drawn() -> None:
    frame = path_frame()
    both, alone = (plots.paths(f, Figure().subplots()) for f in (frame, frame[frame["path"] == "curve"]))
    assert both.lines[1].get_label() == alone.lines[0].get_label() == "curve"
    assert len({str(RUN[name]["linestyle"]) for name in PATHS}) == len(PATHS)
    assert both.lines[1].get_color() == alone.lines[0].get_color() != both.lines[0].get_color()
