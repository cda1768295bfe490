"""Calibrating a run: what predict then does, and whether the promises hold."""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made_runs import Maker, command, data_folder
from helpers.read_runs import read
from helpers.survey import NAMES, TEXTS, put, survey

from loracurve.runs.calibrate import calibrate_run
from loracurve.runs.calibration import read_calibration
from loracurve.runs.predict import predict_rows
from loracurve.runs.run import Run


@pytest.mark.parametrize("given", [False, True])
def test_calibration_is_what_predict_uses(
    given: bool, fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    out = Path(shutil.copytree(fitted("anchored", "letter"), tmp_path / "run"))
    rows = fitted.data("letter") / "test.jsonl"
    command("predict", out, rows, "--out", tmp_path / "raw.jsonl")
    fresh = data_folder(tmp_path / "fresh", "letter", {"train": 1, "validation": 1, "test": 60}) / "test.jsonl"
    capsys.readouterr()
    command("calibrate", out, "--risk=0.6", "--alpha=0.3", *([f"--input={fresh}"] if given else []))
    said = capsys.readouterr().out
    saved = read(out / "calibration.json")
    assert saved["rows"] == (60 if given else 24) and f"temperature {saved['temperature']:.3f}" in said
    assert ("guarantees" in said) == (not given), "the validation split has chosen the trained state"
    assert saved["selective"]["risk"] == 0.6 and saved["conformal"]["alpha"] == 0.3
    command("predict", out, rows, "--out", tmp_path / "calibrated.jsonl")
    before, after = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("raw", "calibrated")
    )
    threshold = saved["selective"]["threshold"]
    for raw, r in zip(before, after, strict=True):
        tempered = (torch.tensor(raw["probs"], dtype=torch.float64).log() / saved["temperature"]).softmax(0)
        assert r["probs"] == pytest.approx(tempered.tolist(), abs=1e-3)
        assert r["entropy"] == raw["entropy"], "uncertainties stay untempered"
        reasons = ["uncertain"] * (threshold is None or r["entropy"] >= threshold)
        foreign = saved["foreign"]
        assert foreign["alpha"] == 0.05 and foreign["rows"] == saved["rows"]
        reasons += ["foreign"] * (r["familiarity"] < 0.05)
        assert r["reasons"] == reasons and r["abstain"] == bool(reasons)
        choices = ["negative", "positive", "no it is"][: len(r["probs"])]
        highest = saved["conformal"]["quantile"] + saved["conformal"]["tolerance"] + 1e-5
        inside = [c for c, p in zip(choices, r["probs"], strict=True) if 1 - p <= highest]
        assert r["set"] == inside
    if given:
        # Prediction sets cover the fresh rows' second half by construction; over all rows about as often.
        command("predict", out, fresh, "--out", tmp_path / "fresh.jsonl")
        labels = [json.loads(line) for line in fresh.read_text().splitlines()]
        found = [json.loads(line) for line in (tmp_path / "fresh.jsonl").read_text().splitlines()]
        covered = [row["choices"][row["label"]] in r["set"] for row, r in zip(labels, found, strict=True)]
        assert sum(covered) / 60 > 0.5


def test_foreign_rows_are_told_from_known_ones(fitted: Maker, tmp_path: Path) -> None:
    out = Path(shutil.copytree(fitted("anchored", "head"), tmp_path / "run"))
    fresh = data_folder(tmp_path / "fresh", "head", {"train": 1, "validation": 1, "test": 200}) / "test.jsonl"
    command("calibrate", out, f"--input={fresh}", "--foreign=0.1", "--risk=0.9")
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(
        "".join(json.dumps({"id": f"f{i}", "text": f"zzz {i} qqq! %% vx " * 6}) + "\n" for i in range(20))
    )
    share = {}
    for name, rows in (("known", fresh), ("foreign", foreign)):
        command("predict", out, rows, "--out", tmp_path / f"{name}.out")
        records = [json.loads(line) for line in (tmp_path / f"{name}.out").read_text().splitlines()]
        share[name] = sum("foreign" in r["reasons"] for r in records) / len(records)
        assert all(r["abstain"] == bool(r["reasons"]) for r in records)
    assert share["known"] <= 0.1 and share["foreign"] > 0.9


def test_what_an_earlier_run_lacks_is_built_by_calibrate(
    fitted: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(shutil.copytree(fitted("anchored", "letter"), tmp_path / "run"))
    rows = fitted.data("letter") / "test.jsonl"
    command("predict", out, rows, "--out", tmp_path / "whole.jsonl")
    assert not caplog.records
    for name in ("unknowns.json", "unknowns.safetensors"):
        (out / name).unlink()
    command("predict", out, rows, "--out", tmp_path / "without.jsonl")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "no Gaussians and no familiarity in this run; loracurve calibrate builds them" in line
    assert "familiarity" not in json.loads((tmp_path / "without.jsonl").read_text().splitlines()[0])
    caplog.clear()
    command("calibrate", out)
    command("predict", out, rows, "--out", tmp_path / "again.jsonl")
    assert not caplog.records
    whole, again = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("whole", "again")
    )
    for one, other in zip(whole, again, strict=True):
        for key in ("within_points", "familiarity"):
            assert one[key] == pytest.approx(other[key], abs=1e-4)


def test_a_new_calibration_replaces_the_old_one(fitted: Maker, tmp_path: Path) -> None:

    out = Path(shutil.copytree(fitted("anchored", "head"), tmp_path / "run"))
    command("calibrate", out, "--measure=entropy")
    command("calibrate", out, "--measure=mutual_information")
    assert read(out / "calibration.json")["measure"] == "mutual_information"


def test_the_temperature_is_judged_on_the_rows_it_has_not_seen(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(fitted("anchored", "head"), tmp_path / "run"))
    rows = fitted.data("head") / "validation.jsonl"
    command("predict", out, rows, "--out", tmp_path / "raw.jsonl")
    capsys.readouterr()
    command("calibrate", out)
    said, saved = capsys.readouterr().out, read(out / "calibration.json")
    labels = [json.loads(line)["label"] for line in rows.read_text().splitlines()]
    probs = torch.tensor([json.loads(line)["probs"] for line in (tmp_path / "raw.jsonl").read_text().splitlines()])
    tempered = (probs.double().log() / saved["temperature"]).log_softmax(1)
    for place, found in enumerate((probs.double().log(), tempered)):
        halves = [saved["nll"][name][place] for name in ("fitted", "held_out")]
        expected = -found[torch.arange(24), torch.tensor(labels)].mean().item()
        assert sum(halves) / 2 == pytest.approx(expected, abs=1e-3), "the halves are 12 rows each"
    (before, after), (unseen_before, unseen_after) = saved["nll"]["fitted"], saved["nll"]["held_out"]
    assert after <= before
    assert f"NLL {before:.4f} -> {after:.4f} on the 12 rows it was fitted to" in said
    assert f"{unseen_before:.4f} -> {unseen_after:.4f} on the 12 others" in said
    assert ("worse on rows it has not seen" in said) == (unseen_after > unseen_before)


def in_company(run: Run, rows: Sequence[dict[str, Any]], size: int, folder: Path) -> list[dict[str, Any]]:
    """Predictions of rows sent so many at a time."""
    found: list[dict[str, Any]] = []
    for start in range(0, len(rows), size):
        found += predict_rows(run, put(folder / "some.jsonl", rows[start : start + size]))
    return found


@pytest.mark.parametrize("level", [0.1, 0.15, 0.25])
def test_promises_hold_for_tied_texts_in_any_company(few_texts: Run, level: float, tmp_path: Path) -> None:
    source = few_texts.folder.parent / "cal.jsonl"
    calibrate_run(few_texts, risk=level, delta=0.1, alpha=level, measure="entropy", path=source)
    saved = read(few_texts.folder / "calibration.json")
    rows = survey(500)
    shuffled = random.Random(0).sample(rows, len(rows))
    # One by one and in small groups the answer depends on the texts alone: a few of them stand for all.
    companies = {
        "one file": (rows, rows, 500),
        "shuffled": (shuffled, shuffled, 500),
        "one by one": (rows, rows[:5], 1),
        "by three": (rows, shuffled[:15], 3),
    }
    decisions = defaultdict(set)
    for name, (whole, sent, size) in companies.items():
        found = in_company(few_texts, sent, size, tmp_path)
        for row, record in zip(sent, found, strict=True):
            decisions[row["text"]].add((record["abstain"], tuple(record["set"]), record["prediction"]))
        by_text = {row["text"]: record for row, record in zip(sent, found, strict=True)}
        assert by_text.keys() == set(TEXTS), name
        records = found if len(sent) == 500 else [by_text[row["text"]] for row in whole]
        pairs = [*zip(whole, records, strict=True)]
        covered = sum(NAMES[row["label"]] in record["set"] for row, record in pairs) / 500
        # The texts' shares of labels are the calibration's own but for the draw of its half.
        assert covered >= 1 - level - 0.01, name
        wrong = [NAMES[row["label"]] != record["prediction"] for row, record in pairs if not record["abstain"]]
        assert len(wrong) / 500 >= saved["selective"]["coverage"], name
        if wrong:
            assert sum(wrong) / len(wrong) <= saved["selective"]["selective_risk"] <= level, name
    assert all(len(found) == 1 for found in decisions.values()), f"a text decides alone: {dict(decisions)}"
    assert saved["selective"]["coverage"] == 0.8, "four texts of five; 5 % of their labels are the other one"


def test_what_the_tolerance_was_measured_with_is_recorded(few_texts: Run) -> None:
    source = few_texts.folder.parent / "cal.jsonl"
    lines = calibrate_run(few_texts, risk=0.1, delta=0.1, alpha=0.1, measure="mutual_information", path=source)
    saved = read(few_texts.folder / "calibration.json")
    dtype = few_texts.config.model.dtype
    assert saved["format"] == 2
    assert saved["rounding"]["dtype"] == dtype and saved["rounding"]["device"] == "cpu"
    batches = saved["rounding"]["batches"]
    assert ("merged" in batches) == (dtype == "float32"), "half precision is never folded"
    assert saved["rounding"]["rows"] == 5 and saved["rounding"]["predictions"] == 500 + 5 + 64 * (len(batches) - 2)
    assert 1e-6 <= saved["conformal"]["tolerance"] < 0.1 and 1e-6 <= saved["selective"]["tolerance"] < 0.1
    assert any(line.startswith("5 distinct rows predicted again") and "mutual information" in line for line in lines)
    found = read_calibration(few_texts.folder)
    assert found is not None and found.tolerance == saved["conformal"]["tolerance"]
    assert found.selective.tolerance == saved["selective"]["tolerance"]
