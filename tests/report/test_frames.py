"""Tables that figures are drawn from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from helpers.made_frames import made_rows, predictions

from loracurve.report import frames
from loracurve.system.errors import UserError


def test_reliability_groups_hold_enough_rows_and_all_of_them() -> None:
    draw = np.random.default_rng(0)
    for rows, groups in ((10, 1), (39, 1), (40, 2), (190, 9), (1000, 10), (1010, 10)):
        chances = 0.5 + draw.random(rows) / 2
        frame = frames.reliability_frame(made_rows([*chances], [*draw.integers(0, 2, rows)]), ["m"])
        assert len(frame) == groups and frame["items"].sum() == rows
        assert frame["items"].min() >= min(frames.LEAST, rows) and frame["confidence"].is_monotonic_increasing
        assert (frame["low"] <= frame["accuracy"]).all() and (frame["accuracy"] <= frame["high"]).all()
        mean = (frame["items"] * frame["confidence"]).sum() / rows
        assert mean == pytest.approx(chances.mean())


def test_rows_of_equal_confidence_stay_together() -> None:
    frame = frames.reliability_frame(made_rows([0.9] * 90 + [0.6] * 15, [0] * 105), ["m"])
    assert frame["items"].tolist() == [105]  # fifteen rows alone say too little
    frame = frames.reliability_frame(made_rows([0.9] * 90 + [0.6] * 25, [0] * 115), ["m"])
    assert frame["items"].tolist() == [25, 90]


def test_sets_in_distribution_come_first() -> None:
    rows = predictions()
    frame = frames.uncertainty_frame(pd.concat([rows[rows["set"] == "elements"], rows[rows["set"] == "test"]]))
    assert list(frame["set"].unique()) == ["test", "elements"]


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
