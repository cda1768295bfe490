"""Figures are written as valid files and look as they should."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers.made_frames import path_frame, predictions
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from loracurve.report import figures, frames, plots, prediction_plots
from loracurve.system.errors import UserError

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
    named = [line for line in named if line.get_linestyle() != "None"]  # not those of markers alone
    assert len({str(line._dash_pattern) for line in named}) == len(named)  # type: ignore[attr-defined]


def test_pyplot_stays_untouched() -> None:
    for make in EVERY.values():
        make()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


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


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        figures.save(EVERY["path"](), tmp_path / "file" / "folder", "name")


def test_the_page_s_copy_keeps_the_colour_of_every_line(tmp_path: Path) -> None:
    def draw(ax: Axes) -> Axes:
        for i, colour in enumerate(figures.COLOURS):
            ax.plot([0, 1], [i, i + 1], color=colour)
        return ax

    png, _ = figures.save(figures.figure_of(draw, legend=False), tmp_path, "lines")
    with Image.open(BytesIO(figures.embedded(png))) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(float) / 255
    for colour in (*figures.COLOURS, "white"):
        near = np.abs(pixels - to_rgb(colour)).max(1).min()
        assert near <= 8 / 255, f"{colour} is off by {255 * near:.0f}"
    assert len(figures.embedded(png)) < png.stat().st_size / 2
