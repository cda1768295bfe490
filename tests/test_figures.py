"""Figures hold the data they were given and are written as valid files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from loracurve.inference.metrics import expected_calibration_error
from loracurve.landscape.config import PATHS
from loracurve.report import figures, frames, plots, prediction_plots
from loracurve.system.errors import UserError

SETS = {"test": (300, 0), "elements": (40, 1)}


def predictions() -> pd.DataFrame:
    """A table as a run writes it: three methods on two sets."""
    draw, tables = np.random.default_rng(3), []
    for method in ("adapter 0", "ensemble", "curve", "straight line"):
        for name, (size, label) in SETS.items():
            p = draw.beta(5, 2, size)
            expected, information = draw.gamma(1, 0.2, size), draw.gamma(1, 0.02, size)
            columns = {
                "method": method,
                "set": name,
                "label": draw.integers(0, 2, size) if label == 0 else None,
                "probs": list(np.stack([p, 1 - p], 1)),
                "entropy": expected + information,
                "expected_entropy": expected,
                "mutual_information": information,
            }
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def made(probs: list[float], labels: list[int], method: str = "m", **measures: list[float]) -> pd.DataFrame:
    """Rows of one method on the test split, with two classes; the probabilities are class 0's."""
    rows = {"method": method, "set": "test", "label": labels, "probs": [[p, 1 - p] for p in probs]}
    return pd.DataFrame(rows | measures)


def lines(axes: Axes) -> dict[str, np.ndarray]:
    """[n, 2] points of each named line."""
    return {str(line.get_label()): line.get_xydata() for line in axes.lines}  # type: ignore[misc]


def path_frame() -> pd.DataFrame:
    t = np.linspace(0, 1, 11)
    rows = [
        (name, "test", x, y)
        for name, ys in (("straight", t * (1 - t)), ("curve", -t))
        for x, y in zip(t, ys, strict=True)
    ]
    return pd.DataFrame(rows, columns=["path", "split", "t", "nll"])


EVERY: dict[str, Callable[[], Figure]] = {
    "path": lambda: figures.figure_of(plots.paths, path_frame(), anchors=[0, 0.5, 1]),
    "reliability": lambda: figures.figure_of(prediction_plots.reliability, frames.reliability_frame(predictions())),
    "uncertainty": lambda: figures.figure_of(
        prediction_plots.uncertainty, frames.uncertainty_frame(predictions()), measure="entropy"
    ),
    "selective": lambda: figures.figure_of(
        prediction_plots.selective_prediction, frames.selective_frame(predictions())
    ),
}


@pytest.mark.parametrize("name", EVERY)
def test_files_are_valid_and_the_same_each_time(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    png, pdf = figures.save(EVERY[name](), folder, name)
    assert sorted(folder.iterdir()) == sorted([png, pdf])  # no temporary files are left
    image = imread(png)
    assert image.shape[1] >= 600 and image[..., :3].std() > 0.01
    assert pdf.read_bytes().startswith(b"%PDF-") and b"%%EOF" in pdf.read_bytes()[-16:]
    again = figures.save(EVERY[name](), tmp_path, name)
    assert [p.read_bytes() for p in again] == [png.read_bytes(), pdf.read_bytes()]


@pytest.mark.parametrize("name", EVERY)
def test_axes_are_named_and_lines_differ_without_colour(name: str) -> None:
    figure = EVERY[name]()
    assert all(axes.get_xlabel() for axes in figure.axes[-1:]) and figure.axes[0].get_ylabel()
    named = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
    assert len({str(line._dash_pattern) for line in named}) == len(named)  # type: ignore[attr-defined]


def test_pyplot_stays_untouched() -> None:
    for make in EVERY.values():
        make()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_path_is_drawn_in_order_and_marks_its_anchors() -> None:
    frame = path_frame().sample(frac=1, random_state=0)
    axes = plots.paths(frame, Figure().subplots(), anchors=[0.0, 0.5, 1.0])
    t = np.linspace(0, 1, 11)
    np.testing.assert_array_equal(lines(axes)["curve"], np.stack([t, -t], 1))
    np.testing.assert_array_equal(lines(axes)["straight (A, B)"], np.stack([t, t * (1 - t)], 1))
    vertical = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]  # type: ignore[index, arg-type]
    assert vertical == [0.0, 0.5, 1.0]
    assert axes.get_ylabel() == "test NLL (nats)"


def test_a_path_looks_the_same_whatever_else_is_drawn() -> None:
    frame = path_frame()
    both, alone = (plots.paths(f, Figure().subplots()) for f in (frame, frame[frame["path"] == "curve"]))
    assert both.lines[1].get_label() == alone.lines[0].get_label() == "curve"
    assert len({str(style["linestyle"]) for style in plots._STYLED.values()}) == len(PATHS)
    assert both.lines[1].get_color() == alone.lines[0].get_color() != both.lines[0].get_color()


def test_reliability_bins_by_hand() -> None:
    # Confidences .5 and .5 lie in (0, .5], .51, .95 and 1 above; class 0 is predicted but for the last one.
    rows = made([0.5, 0.5, 0.51, 0.95, 0.0], [0, 1, 0, 0, 0])
    frame = frames.reliability_frame(rows, ["m"], bins=2)
    assert frame["items"].tolist() == [2, 3]
    np.testing.assert_allclose(frame["confidence"], [0.5, (0.51 + 0.95 + 1) / 3])
    np.testing.assert_allclose(frame["accuracy"], [1 / 2, 2 / 3])
    axes = prediction_plots.reliability(frame, Figure().subplots())
    np.testing.assert_allclose(lines(axes)["m"], frame[["confidence", "accuracy"]])
    (stairs,) = prediction_plots.confidences(frame, Figure().subplots()).patches
    np.testing.assert_array_equal(stairs.get_data().values, [2, 3])  # type: ignore[attr-defined]


def test_reliability_bins_are_those_of_the_ece() -> None:
    rows = predictions().query("method == 'curve' and set == 'test'")
    frame = frames.reliability_frame(rows).query("items > 0")
    ece = (frame["items"] * (frame["confidence"] - frame["accuracy"]).abs()).sum() / frame["items"].sum()
    probs, labels = torch.tensor(np.stack(rows["probs"])), torch.tensor(rows["label"].astype(int).to_numpy())
    assert ece == pytest.approx(expected_calibration_error(probs, labels), abs=1e-6)


def test_empty_bins_have_no_accuracy() -> None:
    frame = frames.reliability_frame(made([0.9], [0]), ["m"], bins=4)
    assert frame["items"].tolist() == [0, 0, 0, 1] and frame["accuracy"].isna().tolist() == [True, True, True, False]


def test_uncertainty_distributions_by_hand() -> None:
    measures = {"entropy": [0.3, 0.1, 0.2, 0.2], "expected_entropy": [0.1] * 4}
    rows = made([0.9] * 4, [0] * 4, "curve", **measures, mutual_information=[-1e-9, 0, 0, 0.2])
    frame = frames.uncertainty_frame(rows)
    entropy = frame[frame["measure"] == "entropy"]
    assert entropy["nats"].tolist() == [0.1, 0.2, 0.2, 0.3] and entropy["fraction"].tolist() == [0.25, 0.5, 0.75, 1]
    axes = prediction_plots.uncertainty(frame, Figure().subplots(), "entropy")
    np.testing.assert_allclose(lines(axes)["test (4)"], [[0.1, 0], [0.1, 0.25], [0.2, 0.5], [0.2, 0.75], [0.3, 1]])
    assert frame[frame["measure"] == "mutual_information"]["nats"].min() == 0


def test_sets_in_distribution_come_first() -> None:
    rows = predictions()
    frame = frames.uncertainty_frame(pd.concat([rows[rows["set"] == "elements"], rows[rows["set"] == "test"]]))
    assert list(frame["set"].unique()) == ["test", "elements"]


def test_selective_prediction_by_hand() -> None:
    # From certain to uncertain: right, wrong, right, wrong. Ranked by MI the order is the opposite one.
    measures = {"entropy": [0.1, 0.2, 0.3, 0.4], "mutual_information": [0.4, 0.3, 0.2, 0.1]}
    frame = frames.selective_frame(made([0.9] * 4, [0, 1, 0, 1], "curve", **measures))
    found = {m: part["accuracy"].tolist() for m, part in frame.groupby("measure")}
    assert found["entropy"] == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert found["mutual_information"] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    axes = prediction_plots.selective_prediction(frame, Figure().subplots())
    np.testing.assert_allclose(lines(axes)["curve, by entropy"], [[0.25, 1], [0.5, 0.5], [0.75, 2 / 3], [1, 0.5]])


def test_panels_share_one_legend() -> None:
    frame = path_frame()
    draws = [lambda ax: plots.paths(frame, ax), lambda ax: plots.paths(frame, ax, split="train")]
    figure = figures.panels(draws, (6, 6), sharex=True)
    assert len(figure.axes) == 2 and len(figure.legends) == 1
    assert [ax.get_xlabel() for ax in figure.axes] == ["", "position on the path t (fraction)"]
    assert all(ax.get_xlabel() for ax in figures.panels(draws, (6, 6)).axes), "axes of their own keep their labels"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["straight (A, B)", "curve"]


@pytest.mark.parametrize(
    "names", [["ensembles", "single", "MC dropout", "SWAG", "IVON", "BLoB"], ["a" * 90, "b"], ["c"]]
)
def test_a_legend_is_as_wide_as_its_figure_at_most(names: list[str]) -> None:
    def draw(axes: Axes) -> None:
        for name in names:
            axes.errorbar([0, 1], [0, 1], yerr=[0.1, 0.1], marker="o", label=name)

    figure = figures.figure_of(draw)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    rows = len({round(text.get_window_extent().y0) for text in legend.get_texts()})
    assert rows == {6: 2, 2: 2, 1: 1}[len(names)]
    assert len(names) == 2 or legend.get_window_extent().width <= figure.bbox.width


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: frames.reliability_frame(predictions(), ["crve"]),
            "'crve' on 'test', found none; there are adapter 0",
        ),
        (lambda: frames.selective_frame(predictions(), split="dev"), "'adapter 0' on 'dev', found none"),
        (lambda: frames.uncertainty_frame(predictions(), "none"), "expected rows of 'none', found none"),
    ],
)
def test_wrong_data_is_named(make: Callable[[], pd.DataFrame], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        figures.save(EVERY["path"](), tmp_path / "file" / "folder", "name")


def test_posterior_over_t_holds_the_weights() -> None:
    frame = pd.DataFrame({"t": [0.0, 0.5, 1.0], "posterior": [0.5, 0.5, 0.0], "prior": [1 / 3] * 3})
    axes = figures.figure_of(prediction_plots.posterior_over_t, frame, temperature=12.0).axes[0]
    np.testing.assert_allclose(lines(axes)["posterior"], [[0, 0.5], [0.5, 0.5], [1, 0]])
    assert axes.get_title() == "T = 12, 2.0 of 3 points effective"
