"""Records of cells: what they hold, and when a stored result is still that of a suite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.suites import anchored, little

from loracurve.baselines.curve import Curve
from loracurve.baselines.single import Single
from loracurve.baselines.temperature import TemperatureScaled
from loracurve.bench.cells import Group
from loracurve.bench.provenance import fingerprint, made_with, options_of
from loracurve.bench.suite import Cell
from loracurve.bench.tiny_model import TINY
from loracurve.model.config import ModelConfig
from loracurve.system.errors import UserError
from loracurve.training.config import LoopConfig


def test_fingerprints_follow_options_and_not_places(tmp_path: Path) -> None:
    suite, cell = little(tmp_path), Cell("made", 0, "curve")
    moved = replace(suite, model=ModelConfig(f"elsewhere/{TINY}"), data_folder="elsewhere")
    assert fingerprint(moved, cell) == fingerprint(suite, cell)
    for changed in (
        replace(suite, samples=4),
        replace(suite, methods=suite.methods | {"curve": anchored(units=3)}),
        replace(suite, training=LoopConfig(steps=5)),
    ):
        assert fingerprint(changed, cell) != fingerprint(suite, cell)
        assert not made_with(options_of(suite, cell), changed, cell)
    assert fingerprint(replace(suite, methods={"curve": anchored(units=4)}), cell) == fingerprint(suite, cell)


def test_records_hold_what_a_curve_leaves_to_the_librarys_defaults(tmp_path: Path) -> None:
    suite, cell = little(tmp_path, methods={"curve": Curve(units=4, training={"eps": 1e-6})}), Cell("made", 0, "curve")
    recorded = options_of(suite, cell)
    training = recorded["method"]["training"]
    assert (training["points"], training["share_points"], training["objective"]["jsd"]) == (1, False, "none")
    assert training["eps"] == 1e-6 and "steps" not in training, "what a fine-tune has too stands with the suite's own"
    assert made_with(recorded, suite, cell)
    inside = replace(suite, methods={"curve": TemperatureScaled(suite.methods["curve"])})
    assert options_of(inside, cell)["method"]["of"] == recorded["method"], "a curve inside another method too"
    training["points"] = 2  # as if it had run when that was the default
    assert not made_with(recorded, suite, cell)


def test_results_stay_usable_when_options_are_added_that_are_off_by_default(tmp_path: Path) -> None:
    suite, cell = little(tmp_path), Cell("made", 0, "curve")
    older = options_of(suite, cell)
    del older["training"]["gradient_checkpointing"]  # as recorded before there was such an option
    assert made_with(older, suite, cell)
    assert not made_with(older, replace(suite, training=replace(suite.training, gradient_checkpointing=True)), cell)
    older["training"]["steps"] += 1
    assert not made_with(older, suite, cell)


def test_results_of_compiled_layers_off_stay_usable(tmp_path: Path) -> None:
    suite, cell = little(tmp_path, methods={"curve": Curve(units=4, training={"eps": 1e-6})}), Cell("made", 0, "curve")
    older = options_of(suite, cell)
    older["training"]["compile"] = older["method"]["training"]["compile"] = False
    assert made_with(older, suite, cell)
    older["training"]["compile"] = True
    assert not made_with(older, suite, cell)


def test_cells_from_before_there_was_a_share_of_validation_stay_and_suites_have_none(tmp_path: Path) -> None:
    suite, cell = little(tmp_path), Cell("made", 0, "curve")
    older = options_of(suite, cell)
    assert older["training"].pop("validation_share") is None
    assert made_with(older, suite, cell)
    older["training"]["validation_share"] = 0.2
    assert not made_with(older, suite, cell)
    with pytest.raises(UserError, match=r"^training.validation_share: expected none in a suite, found 0.1; "):
        replace(suite, training=replace(suite.training, validation_share=0.1))


def test_a_task_has_a_rate_for_curves_of_its_own_that_changes_no_other_method(tmp_path: Path) -> None:
    plain, own = Curve(units=4), Curve(units=4, training={"learning_rate": 3e-3})
    methods = {"one": Single(), "plain": plain, "own": own, "inside": TemperatureScaled(plain)}
    suite = little(tmp_path, methods=methods)
    tasks = {"made": replace(suite.tasks["made"], curve_learning_rate=2e-3)}
    changed = replace(suite, tasks=tasks)
    spelt = replace(suite, methods=methods | {"plain": replace(plain, training={"learning_rate": 2e-3})})
    cells = {name: Cell("made", 0, name) for name in methods}
    for name in ("one", "own"):
        assert options_of(changed, cells[name]) == options_of(suite, cells[name])
    assert options_of(changed, task="made") == options_of(suite, task="made"), "nor the anchors"
    assert options_of(changed, cells["plain"]) == options_of(spelt, cells["plain"])
    assert options_of(changed, cells["inside"])["method"]["of"] == options_of(spelt, cells["plain"])["method"]
    assert not made_with(options_of(suite, cells["plain"]), changed, cells["plain"])
    group = Group(changed, "made", 0, tmp_path / "out")
    group.run(cells["plain"])
    other = Group(spelt, "made", 0, tmp_path / "spelt")
    other.run(cells["plain"])
    predictions = "cells/made/0/plain/predictions.parquet"
    assert (tmp_path / "out" / predictions).read_bytes() == (tmp_path / "spelt" / predictions).read_bytes()
