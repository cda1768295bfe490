"""Figures hold the data they were given and are written as valid files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from loracurve.errors import UserError
from loracurve.report import figures

T = np.linspace(0, 1, 11)


def lines(figure: Figure, axes: int = 0) -> dict[str, np.ndarray]:
    """[n, 2] points of each named line."""
    return {str(line.get_label()): line.get_xydata() for line in figure.axes[axes].lines}  # type: ignore[misc]


def uncertainties(size: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    expected, information = draw.gamma(1, 0.2, size), draw.gamma(1, 0.02, size)
    return {
        "entropy": expected + information,
        "expected_entropy": expected,
        "mutual_information": information,
    }


EVERY: dict[str, Callable[[], Figure]] = {
    "path": lambda: figures.loss_along_path({"straight line": (T, T * (1 - T)), "curve": (T, -T)}, [0, 0.5, 1]),
    "posterior": lambda: figures.posterior_over_t(T, T / T.sum(), np.full(11, 1 / 11), 3.0),
    "reliability": lambda: figures.reliability({"curve": (T, T > 0.4), "single": (T**2, T > 0.6)}),
    "uncertainty": lambda: figures.uncertainty_by_set({"ID": uncertainties(300, 0), "OOD": uncertainties(40, 1)}),
    "selective": lambda: figures.selective_prediction({"curve": (T, 1 - T / 9), "single": (T, 1 - T / 8)}),
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
    shuffled = np.random.default_rng(0).permutation(len(T))
    figure = figures.loss_along_path({"curve": (T[shuffled], T[shuffled] ** 2)}, [0.0, 0.5, 1.0], "test NLL (nats)")
    np.testing.assert_array_equal(lines(figure)["curve"], np.stack([T, T**2], 1))
    vertical = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_label() != "curve"]  # type: ignore[index]
    assert vertical == [0.0, 0.5, 1.0]
    assert figure.axes[0].get_ylabel() == "test NLL (nats)"


def test_reliability_bins_by_hand() -> None:
    confidence, correct = [0.0, 0.5, 0.45, 0.51, 0.95, 1.0], [0, 1, 0, 1, 1, 0]
    figure = figures.reliability({"m": (confidence, correct)}, bins=2)
    # Bins are (low, high]: 0, .5 and .45 lie in the first.
    expected = [[0.95 / 3, 1 / 3], [(0.51 + 0.95 + 1) / 3, 2 / 3]]
    np.testing.assert_allclose(lines(figure)["m"], expected)
    (stairs,) = figure.axes[1].patches
    np.testing.assert_array_equal(stairs.get_data().values, [3, 3])  # type: ignore[attr-defined]


def test_uncertainty_distributions_by_hand() -> None:
    data = {"entropy": [0.3, 0.1, 0.2, 0.2], "expected_entropy": [0.1] * 4, "mutual_information": [-1e-9, 0, 0, 0.2]}
    figure = figures.uncertainty_by_set({"ID": data})
    assert [axes.get_title().split("\n")[1] for axes in figure.axes] == [
        "entropy",
        "expected entropy",
        "mutual information",
    ]
    steps = lines(figure)["ID (4)"]
    np.testing.assert_allclose(steps, [[0.1, 0], [0.1, 0.25], [0.2, 0.5], [0.2, 0.75], [0.3, 1]])
    assert lines(figure, 2)["ID (4)"].min() == 0


def test_posterior_over_t_holds_the_weights() -> None:
    figure = figures.posterior_over_t([0.0, 0.5, 1.0], [0.5, 0.5, 0.0], [1 / 3] * 3, 12.0)
    np.testing.assert_allclose(lines(figure)["posterior"], [[0, 0.5], [0.5, 0.5], [1, 0]])
    assert figure.axes[0].get_title() == "T = 12, 2.0 of 3 points effective"


def test_selective_prediction_holds_the_data() -> None:
    figure = EVERY["selective"]()
    np.testing.assert_array_equal(lines(figure)["single"], np.stack([T, 1 - T / 8], 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: figures.posterior_over_t(T, T[1:], T, 1.0), "posterior: expected two columns of one length"),
        (lambda: figures.loss_along_path({}), "at least one path"),
        (lambda: figures.selective_prediction({"m": (T, T[1:])}), "m: expected two columns of one length, found 11"),
        (lambda: figures.reliability({"m": ([0.5, 1.2], [1, 1])}), r"m: expected confidences in \[0, 1\]"),
        (lambda: figures.uncertainty_by_set({"ID": {"entropy": T}}), "ID: expected expected_entropy"),
        (lambda: figures.uncertainty_by_set({"ID": {"entropy": []}}), "ID: expected entropy for each item, found none"),
    ],
)
def test_wrong_data_is_named(make: Callable[[], Figure], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        figures.save(EVERY["path"](), tmp_path / "file" / "folder", "name")
