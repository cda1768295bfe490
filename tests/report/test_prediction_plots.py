"""Figures of predictions hold the data they were given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers.made_frames import lines, made_rows
from matplotlib.figure import Figure

from loracurve.report import figures, frames, prediction_plots


def test_reliability_groups_by_hand() -> None:
    # 25 rows of confidence .6, 15 of them right, and 30 of .9 and 1, all right but one.
    chances, labels = [0.6] * 25 + [0.9] * 15 + [1.0] * 15, [0] * 15 + [1] * 10 + [0] * 29 + [1]
    frame = frames.reliability_frame(made_rows(chances, labels), ["m"])
    assert frame["items"].tolist() == [25, 30]
    np.testing.assert_allclose(frame["confidence"], [0.6, 0.95])
    np.testing.assert_allclose(frame["accuracy"], [15 / 25, 29 / 30])
    # Wilson's interval of 15 of 25 at z = 1.96.
    middle, half = (0.6 + 1.96**2 / 50) / (1 + 1.96**2 / 25), 1.96 / (1 + 1.96**2 / 25)
    half *= (0.6 * 0.4 / 25 + 1.96**2 / 2500) ** 0.5
    np.testing.assert_allclose(frame.loc[0, ["low", "high"]].astype(float), [middle - half, middle + half], atol=1e-4)
    axes = prediction_plots.reliability(frame, Figure().subplots())
    (bars,) = axes.containers
    np.testing.assert_allclose(bars.lines[0].get_xydata(), frame[["confidence", "accuracy"]])
    assert figures.label("m") in axes.get_legend_handles_labels()[1]


def test_uncertainty_distributions_by_hand() -> None:
    measures = {"entropy": [0.3, 0.1, 0.2, 0.2], "expected_entropy": [0.1] * 4}
    rows = made_rows([0.9] * 4, [0] * 4, "curve", **measures, mutual_information=[-1e-9, 0, 0, 0.2])
    frame = frames.uncertainty_frame(rows)
    entropy = frame[frame["measure"] == "entropy"]
    assert entropy["nats"].tolist() == [0.1, 0.2, 0.2, 0.3] and entropy["fraction"].tolist() == [0.25, 0.5, 0.75, 1]
    axes = prediction_plots.uncertainty(frame, Figure().subplots(), "entropy")
    np.testing.assert_allclose(lines(axes)["test (4)"], [[0.1, 0], [0.1, 0.25], [0.2, 0.5], [0.2, 0.75], [0.3, 1]])
    assert frame[frame["measure"] == "mutual_information"]["nats"].min() == 0


def test_selective_prediction_by_hand() -> None:
    # From certain to uncertain: right, wrong, right, wrong. Ranked by MI the order is the opposite one.
    measures = {"entropy": [0.1, 0.2, 0.3, 0.4], "mutual_information": [0.4, 0.3, 0.2, 0.1]}
    frame = frames.selective_frame(made_rows([0.9] * 4, [0, 1, 0, 1], "curve", **measures))
    found = {m: part["accuracy"].tolist() for m, part in frame.groupby("measure")}
    assert found["entropy"] == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert found["mutual_information"] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    axes = prediction_plots.selective_prediction(frame, Figure().subplots())
    np.testing.assert_allclose(lines(axes)["curve, by entropy"], [[0.25, 1], [0.5, 0.5], [0.75, 2 / 3], [1, 0.5]])


def test_posterior_over_t_holds_the_weights() -> None:
    frame = pd.DataFrame({"t": [0.0, 0.5, 1.0], "posterior": [0.5, 0.5, 0.0], "prior": [1 / 3] * 3})
    axes = figures.figure_of(prediction_plots.posterior_over_t, frame, temperature=12.0).axes[0]
    np.testing.assert_allclose(lines(axes)["posterior"], [[0, 0.5], [0.5, 0.5], [1, 0]])
    assert axes.get_title() == "T = 12, 2.0 of 3 points effective"
