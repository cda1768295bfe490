"""A method looks the same in all figures of a page."""

from __future__ import annotations

from typing import Any

import pandas as pd
from helpers.made_frames import lines, predictions
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from loracurve.report import frames, plots, prediction_plots, suite_plots
from loracurve.report.figures import COLOURS
from loracurve.report.looks import RUN, looks_of


def test_a_run_s_methods_keep_their_colours_from_figure_to_figure() -> None:
    found: dict[str, set[str]] = {}

    def see(names: list[str], artists: list[Any]) -> None:
        for name, artist in zip(names, artists, strict=True):
            found.setdefault(name, set()).add(to_hex(artist.get_color()))

    table = predictions()
    for shown in (["ensemble", "curve"], ["curve"], ["adapter 0", "ensemble", "curve"]):
        axes = prediction_plots.reliability(frames.reliability_frame(table, shown), Figure().subplots())
        see(shown, [bars.lines[0] for bars in axes.containers])
    selective = prediction_plots.selective_prediction(frames.selective_frame(table), Figure().subplots())
    ranked = lines(selective)
    see([name.split(",")[0] for name in ranked], list(selective.lines))
    points = pd.DataFrame({"path": ["straight line", "curve"], "split": "test", "t": 0.0, "nll": 1.0})
    drawn = plots.points_and_average(points, Figure().subplots(), average=(0.5, 0.4, 0.6))
    see(["curve", "straight line", "curve"], list(drawn.lines))
    assert str(drawn.lines[0].get_label()).startswith("curve's average")
    assert {name: len(colours) for name, colours in found.items()} == dict.fromkeys(found, 1)
    assert len(set.union(*found.values())) == len(found) == 4


def test_names_mean_the_same_and_unknown_ones_get_what_is_free() -> None:
    looks = looks_of(["adapter 3", "single adapter (mean of 2)", "best point", "adapters of mine", "curve", "curve"])
    assert looks["adapter 3"] == looks["single adapter (mean of 2)"] == looks["best point"] == RUN["single adapter"]
    colours = [looks[name]["color"] for name in ("adapters of mine", "curve", "adapter 3")]
    assert len(set(colours)) == 3
    many = looks_of([*RUN, *map(str, range(30))])
    assert len({str(look) for look in many.values()}) == len(many) > len(COLOURS)


def test_a_suite_s_method_has_its_colour_in_all_kinds_of_figures() -> None:
    known = looks_of(["a", "b", "c", "ensembles"])
    values = {"entropy": [0.5], "MI": [0.6], "score": [0.3], "low": [0.2], "high": [0.4], "t": [0.5], "nll": [0.3]}
    row = pd.DataFrame({"method": ["b"], "path": ["b"], "order": ["W"], "coverage": [1.0], "risk": [0.1], **values})
    sizes = pd.DataFrame({"members": [1, 2], "score": [0.5, 0.4]})
    drawn = [
        suite_plots.by_information_and_entropy(row, Figure().subplots(), known),
        suite_plots.risk_and_coverage(row, Figure().subplots(), known),
        suite_plots.points(row, Figure().subplots(), known),
        suite_plots.ensemble_sizes(sizes, row, Figure().subplots(), known),
    ]
    for axes in drawn:
        assert axes.lines[-1].get_color() == known["b"]["color"]
