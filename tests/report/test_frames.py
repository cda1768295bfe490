"""Tables that figures are drawn from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.made_frames import made_rows, predictions

from loracurve.inference.metrics import expected_calibration_error
from loracurve.report import frames
from loracurve.system.errors import UserError


def test_reliability_bins_are_those_of_the_ece() -> None:
    rows = predictions().query("method == 'curve' and set == 'test'")
    frame = frames.reliability_frame(rows).query("items > 0")
    ece = (frame["items"] * (frame["confidence"] - frame["accuracy"]).abs()).sum() / frame["items"].sum()
    probs, labels = torch.tensor(np.stack(rows["probs"])), torch.tensor(rows["label"].astype(int).to_numpy())
    assert ece == pytest.approx(expected_calibration_error(probs, labels), abs=1e-6)


def test_empty_bins_have_no_accuracy() -> None:
    frame = frames.reliability_frame(made_rows([0.9], [0]), ["m"], bins=4)
    assert frame["items"].tolist() == [0, 0, 0, 1] and frame["accuracy"].isna().tolist() == [True, True, True, False]


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
