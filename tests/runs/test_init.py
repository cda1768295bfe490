"""A first configuration for a table, which fit runs as it stands."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from helpers.made_runs import QUICK, Maker, command, data_folder

from loracurve.cli import main
from loracurve.model.config import ModelConfig
from loracurve.runs.config import RunConfig, load_config
from loracurve.runs.fit import fit_run
from loracurve.runs.identity import read_identity
from loracurve.system.errors import UserError
from loracurve.tasks.config import Columns, TaskConfig
from loracurve.training.config import steps_for


def reviews(path: Path, classes: list[str], rows: int = 60) -> Path:
    texts = [f"this is the review number {i} of many, {'so long ' * (i % 3)}" for i in range(rows)]
    pd.DataFrame({"review": texts, "stars": [classes[i % len(classes)] for i in range(rows)]}).to_csv(path, index=False)
    return path


def test_what_init_writes_is_what_fit_runs_and_predict_reads(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reviews(tmp_path / "my reviews.csv", ["no", "yes: really", "3"])
    command("init", "my reviews.csv")
    printed = capsys.readouterr().out
    assert "60" not in printed.splitlines()[0] and "48 train, 6 validation, 6 test rows" in printed
    assert "3 16, no 16, yes: really 16" in printed
    assert "loracurve fit config.yaml --out runs/my-reviews" in printed
    config = load_config("config.yaml")
    assert config.task.data == "my reviews.csv" and config.task.columns == Columns(text="review", label="stars")
    assert (config.task.scoring, config.task.template) == ("letter", "class_letter")
    assert config.curve_training.steps == steps_for(48)
    quick = [word for word in QUICK if not word.startswith("--curve.anchors")]
    command("fit", "config.yaml", "--out", "run", "--model.name", fitted.base("qwen2"), *quick)
    pd.read_csv("my reviews.csv")[["review"]].iloc[::-1].to_parquet("new.parquet")
    command("predict", "run", "new.parquet", "--out", "predictions.csv")
    with open("predictions.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["id"] for row in found] == [str(i + 1) for i in range(60)]
    assert {"prob_3", "prob_no", "prob_yes: really", "entropy", "familiarity"} <= found[0].keys()
    # The file that was fitted to keeps its test rows; another file is test rows only, here of one class of three.
    command("evaluate", "run", "--task", "my reviews.csv", "--out", "again")
    assert judged("again") == judged("run")
    own = pd.read_csv("my reviews.csv", dtype=str)
    own[own.stars == "no"].to_json("one.jsonl", orient="records", lines=True)
    command("evaluate", "run", "--task", "one.jsonl", "--out", "one")
    right = [row["prediction"] == "no" for row, star in zip(found[::-1], own.stars, strict=True) if star == "no"]
    assert judged("one")["examples"] == len(right) == 20
    assert judged("one")["acc"] == pytest.approx(sum(right) / 20)
    recorded = read_identity(Path("run"))
    assert recorded is not None and recorded.data["columns"] == {"text": "review", "label": "stars"}
    assert recorded.data["place"] == str(tmp_path / "my reviews.csv")
    command("calibrate", "run", "--input", "my reviews.csv")
    command("predict", "run", "new.parquet", "--out", "calibrated.parquet")
    table = pd.read_parquet("calibrated.parquet")
    assert table["id"].tolist() == [row["id"] for row in found]
    assert all(bool(a) == bool(len(r)) for a, r in zip(table["abstain"], table["reasons"], strict=True))


def judged(folder: str) -> dict[str, float]:
    methods = json.loads(Path(folder, "metrics.json").read_text())["methods"]
    found: dict[str, float] = methods["curve"]["sets"]["test"]
    return found


def test_a_run_needs_a_file(tmp_path: Path) -> None:
    task = TaskConfig(pd.DataFrame({"text": ["a"], "label": [1]}), "letter")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected a path or a name for a run.*found DataFrame; write the rows to a f"):
        fit_run(RunConfig(ModelConfig("m"), task), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("columns", [[], ["text"], {"texts": "a"}, {"text": 3}, "text"])
def test_recorded_columns_that_are_none(columns: object, fitted: Maker, tmp_path: Path) -> None:
    shutil.copytree(fitted("free", "letter"), tmp_path / "run")
    path = tmp_path / "run" / "identity.json"
    values = json.loads(path.read_text())
    values["data"]["columns"] = columns
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="expected what loracurve fit wrote"):
        read_identity(tmp_path / "run")


def test_init_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = reviews(tmp_path / "a.csv", ["x", "y"]), tmp_path / "c.yaml"
    out.write_text("mine")
    assert main(["init", str(data), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err and out.read_text() == "mine"


def test_many_classes_and_classes_of_the_same_words_get_a_head(tmp_path: Path) -> None:
    for name, classes in (("many", [f"class {i}" for i in range(27)]), ("same", ["Yes_no", "yes no"])):
        command("init", reviews(tmp_path / f"{name}.csv", classes, 108), "--out", tmp_path / f"{name}.yaml")
        assert load_config(tmp_path / f"{name}.yaml").task.scoring == "head"


@pytest.mark.parametrize("scoring", ["letter", "lm"])
def test_init_looks_at_folders_too(scoring: str, tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", scoring)
    command("init", folder, "--out", tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml")
    assert (config.task.data, config.task.scoring) == (str(folder), scoring)


def test_a_hostile_name_stays_in_its_comment(tmp_path: Path) -> None:
    classes = ["a\nmodel: {name: evil}", "b # c", 'd"e', "\N{GRINNING FACE}"]
    command("init", reviews(tmp_path / 'x"y #z.csv', classes), "--out", tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml")
    assert config.task.data == str(tmp_path / 'x"y #z.csv') and "evil" not in config.model.name


def test_what_cannot_be_guessed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("this is a text without any header,1\nanother text that goes on,0\n")
    assert main(["init", str(tmp_path / "a.csv"), "--out", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "c.yaml").exists()
