"""Runs and suites that go on: with what they began with, or refused in a line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.made_runs import QUICK, Maker, command
from helpers.suites import WORK, anchored, little

from loracurve.bench.config import SuiteTask
from loracurve.bench.runner import run_suite
from loracurve.cli import main
from loracurve.runs.config import load_config
from loracurve.runs.fit import fit_run
from loracurve.system.errors import CheckpointError, UserError
from loracurve.system.files import read_json
from loracurve.training import loop


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("loracurve: ")
    return said


def test_a_run_goes_on_with_the_options_that_it_began_with(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(fitted("anchored", "letter"), tmp_path / "run"))
    again = ["fit", fitted.config("letter"), "--out", out, *QUICK, "--resume"]
    (out / "metrics.json").unlink()
    begun = (out / "config.yaml").read_bytes()
    for option, before, now in (
        ("lora.r", "2", "4"),
        ("evaluation.points", "3", "5"),
        ("curve_training.seed", "0", "1"),
        ("anchor_training.steps", "4", "8"),
        ("anchor_training.learning_rate", "at most 0.01", "0.1"),
        ("model.dtype", "'auto'", "'bfloat16'"),
        ("curve.segments", "2", "3"),
        ("task.prompt", "None", "'{question} Now: {choices}'"),
    ):
        said = refused(capsys, *again, f"--{option}={now.strip(chr(39))}")
        assert f"{out}/config.yaml: {option}: expected {before}, as it was so far, found {now}; go on with the" in said
    assert (out / "config.yaml").read_bytes() == begun
    command(*again, "--curve_training.checkpoint_every=1", "--tracker=none")
    assert read_json(out / "metrics.json")["training"]["changes"] == [], "all steps had been taken"
    assert load_config(out / "config.yaml").curve_training.checkpoint_every == 1


@pytest.mark.parametrize("part", ["anchors", "training"])
def test_a_run_does_not_go_on_from_the_checkpoint_of_another(
    part: str, fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of two runs is whole; their files were mixed up."""
    out = Path(shutil.copytree(fitted("anchored", "letter"), tmp_path / "run"))
    arguments = ["fit", fitted.config("letter"), *QUICK]
    seeds = ["--anchor_training.seed=5", "--curve_training.seed=5"]
    command(*arguments, *seeds, "--out", tmp_path / "other")
    shutil.rmtree(out / part)
    shutil.copytree(tmp_path / "other" / part, out / part)
    said = refused(capsys, *arguments, "--out", out, "--resume")
    assert f"{out / part}: seed: expected 5, as it was so far, found 0" in said
    with pytest.raises(CheckpointError, match="seed: expected 5"):
        fit_run(load_config(out / "config.yaml"), out, resume=True, progress=False)
    # The curve of the same options through other anchors.
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "other", out)
    if part == "anchors":
        shutil.rmtree(out / "anchors")
        command(*arguments, "--anchor_training.seed=6", seeds[1], "--out", tmp_path / "third")
        shutil.copytree(tmp_path / "third" / "anchors", out / "anchors")
        (out / "config.yaml").write_bytes((tmp_path / "third" / "config.yaml").read_bytes())
        said = refused(capsys, *arguments, "--anchor_training.seed=6", seeds[1], "--out", out, "--resume")
        assert f"{out / 'training'}: expected the anchors that it began with, found others" in said


@pytest.mark.parametrize("part", ["anchors", "cells"])
def test_a_damaged_checkpoint_is_no_result_of_a_suite(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell is left, the line says what to delete, and then the same command does the whole work."""
    monkeypatch.setattr(loop, "BETWEEN_CHECKPOINTS", 0.0)
    made = {"made": SuiteTask(scoring="label")}
    suite, out = little(tmp_path, tasks=made, methods={"curve": anchored(units=1)}), tmp_path / "out"
    said: list[str] = []
    run_suite(suite, out, jobs=1, say=said.append)
    work = {"anchors": "anchors/made/0", "cells": "cells/made/0/curve"}[part]
    kept = {p: p.read_bytes() for p in out.glob("cells/**/predictions.parquet")}

    class Stopped(BaseException):
        """What a kill looks like from inside."""

    step, stop = torch.optim.AdamW.step, [True]

    def stopped(self: torch.optim.AdamW, *args: object) -> object:
        if stop[0] and any(out.glob(f"{work}/{WORK}/**/checkpoint.json")):
            raise Stopped
        return step(self, *args)

    shutil.rmtree(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stopped)
        with pytest.raises(Stopped):
            run_suite(suite, out, jobs=1, say=said.append)
    tensors = next(out.glob(f"{work}/{WORK}/**/checkpoint-*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    said.clear()
    with pytest.raises(UserError, match="could not run now"):
        run_suite(suite, out, jobs=1, say=said.append)
    assert any(f"not now: {tensors.parent}: expected a checkpoint as it was written" in line for line in said), said
    assert not list((out / work).glob("cell.json")) and not list(out.rglob("failed.json"))
    shutil.rmtree(tensors.parent)
    run_suite(suite, out, jobs=1, say=said.append)
    assert {p: p.read_bytes() for p in out.glob("cells/**/predictions.parquet")} == kept
