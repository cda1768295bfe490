"""Predicting new rows with a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.made_runs import Maker, command, predictions
from helpers.read_runs import table

from loracurve.cli import main
from loracurve.runs.predict import prediction_table


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
            "id", "label", "prediction", "probs", "entropy", "expected_entropy", "mutual_information", "within_points",
            "between_points", "familiarity",
        }  # fmt: skip
        assert r["probs"] == pytest.approx(expected[r["id"]]["probs"], abs=1e-5)
        assert 0 < r["familiarity"] <= 1
        for key in ("entropy", "expected_entropy", "mutual_information", "within_points", "between_points"):
            assert r[key] == pytest.approx(expected[r["id"]][key], abs=1e-5)
        names = texts[r["id"]].get("choices", ["negative", "positive"])
        assert r["label"] == r["probs"].index(max(r["probs"])) and r["prediction"] == names[r["label"]]


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "CSV"])
def test_predictions_as_a_table_are_those_of_the_lines(
    ending: str, fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rows = fitted("free", "head"), unlabelled(fitted.data("head"), tmp_path / "rows.jsonl")
    expected = predictions(capsys, run, rows)
    pd.read_json(rows, lines=True, dtype=False)[["text"]].to_csv(tmp_path / "texts.csv")
    command("predict", run, tmp_path / "texts.csv", "--out", tmp_path / f"p.{ending}")
    path = tmp_path / f"p.{ending}"
    found = pd.read_parquet(path) if ending == "parquet" else pd.read_csv(path, sep=None, engine="python")
    assert [*found.columns] == [
        *("id", "prediction", "prob_negative", "prob_positive", "entropy", "expected_entropy", "mutual_information"),
        *("within_points", "between_points", "familiarity"),
    ]
    assert found["id"].astype(int).tolist() == list(range(1, len(expected) + 1))
    assert found["prediction"].tolist() == [r["prediction"] for r in expected]
    np.testing.assert_allclose(found[["prob_negative", "prob_positive"]], [r["probs"] for r in expected], atol=2e-6)
    np.testing.assert_allclose(found["entropy"], [r["entropy"] for r in expected], atol=2e-6)


def test_a_calibrated_table_says_whether_to_abstain() -> None:
    record = {"id": "a", "label": 1, "prediction": "y", "probs": [0.25, 0.75], "entropy": 0.5, "abstain": True}
    more = {"reasons": ["uncertain", "foreign"], "set": ["x", "y"]}
    table = prediction_table([record | more, record | {"abstain": False, "reasons": [], "set": ["y"]}], ("x", "y"))
    assert table.to_pylist()[0] == {
        **{"id": "a", "prediction": "y", "prob_x": 0.25, "prob_y": 0.75, "entropy": 0.5, "abstain": True},
        **more,
    }
    choices = prediction_table([record, record | {"probs": [0.2, 0.2, 0.6]}], ())
    assert choices["prob_C"].to_pylist() == [None, 0.6]


def test_a_table_without_the_columns_of_the_run(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text("sentence,label\na,b\n")
    for scoring, expected in (("head", "expected a column 'text'"), ("letter", "a table has no multiple_choice rows")):
        assert main(["predict", str(fitted("free", scoring)), str(tmp_path / "rows.csv")]) == 2
        assert expected in capsys.readouterr().err
