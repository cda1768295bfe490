"""Predicting new rows with a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.made_runs import Maker, command
from helpers.read_runs import table


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
