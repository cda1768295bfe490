"""Predicting new rows with a run, and calibrating it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.made_runs import Maker, command, data_folder
from helpers.read_runs import read, table


def unlabelled(data: Path, path: Path) -> Path:
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "label"}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("scoring", ["letter", "text", "head"])
def test_predict_needs_no_labels_and_gives_what_the_run_recorded(
    scoring: str, fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = fitted("anchored", scoring), unlabelled(fitted.data(scoring), tmp_path / "rows.jsonl")
    capsys.readouterr()
    command("predict", out, rows)
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in printed.splitlines()]
    command("predict", out, rows, "--out", tmp_path / "p.jsonl")
    assert (tmp_path / "p.jsonl").read_text() == printed
    expected = table(out)
    assert [r["id"] for r in records] == [json.loads(line)["id"] for line in rows.read_text().splitlines()]
    texts = {json.loads(line)["id"]: json.loads(line) for line in rows.read_text().splitlines()}
    for r in records:
        assert r.keys() == {
            "id", "label", "prediction", "probs", "entropy", "expected_entropy", "mutual_information",
        }  # fmt: skip
        assert r["probs"] == pytest.approx(expected[r["id"]]["probs"], abs=1e-5)
        for key in ("entropy", "expected_entropy", "mutual_information"):
            assert r[key] == pytest.approx(expected[r["id"]][key], abs=1e-5)
        names = texts[r["id"]].get("choices", ["negative", "positive"])
        assert r["label"] == r["probs"].index(max(r["probs"])) and r["prediction"] == names[r["label"]]


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
        assert r["abstain"] == (threshold is None or r["entropy"] >= threshold)
        choices = ["negative", "positive", "no it is"][: len(r["probs"])]
        inside = [c for c, p in zip(choices, r["probs"], strict=True) if 1 - p <= saved["conformal"]["quantile"] + 1e-5]
        assert r["set"] == inside
    if given:
        # Prediction sets cover the fresh rows' second half by construction; over all rows about as often.
        command("predict", out, fresh, "--out", tmp_path / "fresh.jsonl")
        labels = [json.loads(line) for line in fresh.read_text().splitlines()]
        found = [json.loads(line) for line in (tmp_path / "fresh.jsonl").read_text().splitlines()]
        covered = [row["choices"][row["label"]] in r["set"] for row, r in zip(labels, found, strict=True)]
        assert sum(covered) / 60 > 0.5


def test_a_new_calibration_replaces_the_old_one(fitted: Maker, tmp_path: Path) -> None:

    out = Path(shutil.copytree(fitted("anchored", "head"), tmp_path / "run"))
    command("calibrate", out, "--measure=entropy")
    command("calibrate", out, "--measure=mutual_information")
    assert read(out / "calibration.json")["measure"] == "mutual_information"
