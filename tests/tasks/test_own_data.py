"""People's own tables as data sets: columns, classes by name, splits, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.documents import fenced
from helpers.places import ROOT
from helpers.tokenizers_made import qwen_style

from loracurve.system.errors import UserError
from loracurve.tasks.config import Columns, TaskConfig
from loracurve.tasks.dataset import Dataset
from loracurve.tasks.own_data import dataset_from_rows, rows_from_table
from loracurve.tasks.repeats import in_training
from loracurve.tasks.task import load_task, open_dataset, settled_dataset

NAMES = ["bad", "fine", "good"]


def frame(rows: int = 60, classes: list[Any] = NAMES, **more: Any) -> pd.DataFrame:
    """Texts that all differ, with a class each."""
    texts = [f"this is the review number {i} of many" for i in range(rows)]
    return pd.DataFrame({"review": texts, "stars": [classes[i % len(classes)] for i in range(rows)], **more})


def by_text(dataset: Dataset) -> dict[str | None, tuple[str, str]]:
    """Split and class name of each row by its text."""
    return {row.text: (split, dataset.labels[row.label or 0]) for split, rows in dataset.splits.items() for row in rows}


def test_all_formats_give_the_same_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    own = frame()
    own.to_csv(tmp_path / "reviews.csv", index=False)
    own.to_csv(tmp_path / "semicolon.csv", sep=";", index=False)
    own.to_csv(tmp_path / "reviews.tsv", sep="\t", index=False)
    own.to_parquet(tmp_path / "reviews.parquet")
    own.to_json(tmp_path / "reviews.jsonl", orient="records", lines=True)
    own.to_json(tmp_path / "reviews.json", orient="records")
    first = open_dataset(str(tmp_path / "reviews.csv"))
    assert first.name == "reviews" and first.kind == "classification" and first.labels == tuple(NAMES)
    assert first.columns == {"text": "review", "label": "stars"}
    assert {n: len(rows) for n, rows in first.splits.items()} == {"train": 48, "validation": 6, "test": 6}
    assert by_text(first).keys() == set(own.review)
    assert {text: name for text, (_, name) in by_text(first).items()} == dict(zip(own.review, own.stars, strict=True))
    for row in first.rows("train"):
        assert own.review[int(row.id) - 1] == row.text
    others: list[Any] = [str(p) for p in sorted(tmp_path.iterdir()) if p.name != "reviews.csv"]
    for other in (*others, own, datasets.Dataset.from_pandas(own)):
        assert open_dataset(other).splits == first.splits
    assert len(others) == 5


def test_a_shuffled_file_has_the_same_splits_and_repeated_texts_stand_in_one() -> None:
    own = frame(90)
    own.loc[len(own)] = ["This is the REVIEW number 3 of many!", "bad"]
    first, shuffled = open_dataset(own), open_dataset(own.sample(frac=1, random_state=0))
    assert by_text(first) == by_text(shuffled)
    assert in_training(first) == []
    assert by_text(first)["This is the REVIEW number 3 of many!"] == by_text(first)[own.review[3]]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1, 2, 10], ("1", "2", "10")),
        ([1.0, 2.0, 10.0], ("1", "2", "10")),
        (["1", "2.0", "10"], ("1", "2", "10")),
        ([0.5, 1.0, -1], ("-1", "0.5", "1")),
        (["007", "008", "9"], ("007", "008", "9")),
        ([True, False], ("False", "True")),
        (np.array([True, False]), ("False", "True")),
        (["b ", "a", " b"], ("a", "b")),
        (["1.5", "x"], ("1.5", "x")),
    ],
)
def test_class_names_and_their_order(values: list[Any], labels: tuple[str, ...]) -> None:
    assert open_dataset(frame(60, list(values))).labels == labels


def test_class_labels_of_datasets_have_their_names_and_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["yes", "no"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    texts = [f"a text with the number {i}" for i in range(40)]
    data = datasets.Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(40)]}, features=features)
    hidden = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]}, features=features)
    data.to_parquet(tmp_path / "rows.parquet")
    for given in (data, str(tmp_path / "rows.parquet"), datasets.DatasetDict({"train": data, "test": hidden})):
        dataset = open_dataset(given)
        assert dataset.labels == ("yes", "no")
        assert {text: name for text, (_, name) in by_text(dataset).items()} == {
            text: ("yes", "no")[i % 2] for i, text in enumerate(texts)
        }
    assert "test without labels left out" in dataset.notes


def test_a_folder_whose_test_file_has_fewer_classes_in_another_order(tmp_path: Path) -> None:
    frame(60).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame({"stars": ["good", "bad"], "review": ["it was a good one", "it was a bad one"]}).to_parquet(
        tmp_path / "test.parquet"
    )
    dataset = open_dataset(str(tmp_path))
    assert dataset.labels == tuple(NAMES)
    assert [dataset.labels[row.label or 0] for row in dataset.rows("test")] == ["good", "bad"]
    assert {n: len(rows) for n, rows in dataset.splits.items()} == {"train": 54, "validation": 6, "test": 2}
    frame(4, ["good", "great"]).to_csv(tmp_path / "dev.csv", index=False)
    with pytest.raises(UserError, match=r"dev.csv, line 3: expected classes that .*train.csv has.*found 'great'"):
        open_dataset(str(tmp_path))


def test_a_test_file_without_labels_is_left_out_and_ids_are_in_all_files_or_in_none(tmp_path: Path) -> None:
    frame(id=range(100, 160)).to_csv(tmp_path / "train.csv", index=False)
    frame(7)[["review"]].to_csv(tmp_path / "test.csv", index=False)
    dataset = open_dataset(str(tmp_path))
    assert {n: len(rows) for n, rows in dataset.splits.items()} == {"train": 48, "validation": 6, "test": 6}
    assert "test without labels left out" in dataset.notes and "id" not in dataset.columns
    frame(7, id=range(7)).to_csv(tmp_path / "test.csv", index=False)
    assert [row.id for row in open_dataset(str(tmp_path)).rows("test")] == [str(i) for i in range(7)]


def test_rows_of_a_group_stay_together() -> None:
    own = frame(90, who=[f"person {i % 30}" for i in range(90)])
    dataset = open_dataset(own, columns=Columns(group="who"))
    who = dict(zip(own.review, own.who, strict=True))
    people = [{who[row.text] for row in rows} for rows in dataset.splits.values()]
    assert sum(map(len, people)) == 30 and all(people)
    assert "'who'" in dataset.notes


def test_pairs_ids_and_names_of_ones_own() -> None:
    own = pd.DataFrame(
        {
            "id": [f"q{i}" for i in range(40)],
            "premise": [f"some premise {i}" for i in range(40)],
            "hypothesis": [f"some hypothesis {i}" for i in range(40)],
            "label": ["yes", "no"] * 20,
        }
    )
    dataset = open_dataset(own)
    assert dataset.columns == {"text": "premise", "text2": "hypothesis", "label": "label", "id": "id"}
    row = dataset.rows("train")[0]
    assert (row.text, row.text2) == (f"some premise {row.id[1:]}", f"some hypothesis {row.id[1:]}")
    other = open_dataset(own, columns=Columns(text="hypothesis", id="premise"))
    assert other.columns == {"text": "hypothesis", "label": "label", "id": "premise"}
    own["id"] = "same"
    assert "id" not in open_dataset(own).columns
    with pytest.raises(UserError, match="row 2: id 'same' was used in DataFrame, row 1 already"):
        open_dataset(own, columns=Columns(id="id"))


def test_a_column_without_a_telling_name_is_found_by_what_it_holds() -> None:
    own = frame().rename(columns={"review": "Spalte 1", "stars": "Spalte 2"})
    assert open_dataset(own).columns == {"text": "Spalte 1", "label": "Spalte 2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"review": [None] + [f"t {i}" for i in range(59)]}, "row 1: expected 'review' as text that is not blank, fou"),
        ({"review": ["  "] + [f"t {i}" for i in range(59)]}, "row 1: expected 'review' as text that is not blank, fou"),
        ({"stars": ["a", None, np.nan] * 20}, "row 2: expected a label in 'stars', found none, and so in 40 of 60"),
        ({"stars": ["a"] * 60}, "expected at least two classes in 'stars', found only 'a'"),
        ({"stars": [i / 7 for i in range(60)]}, "found 60 different numbers, which look like measurements"),
        ({"stars": [f"class {i}" for i in range(60)]}, "found 60 different values in 60 rows"),
        ({"stars": [["a"], ["b"]] * 30}, r"row 1: expected 'stars' as text or a number, found \['a'\]"),
        ({"review": ["same text"] * 60}, "found too few different texts in 60 rows"),
    ],
)
def test_rows_that_are_refused(change: dict[str, Any], message: str) -> None:
    own = frame().assign(**{name: pd.Series(values, dtype=object) for name, values in change.items()})
    with pytest.raises(UserError, match=message) as error:
        open_dataset(own, columns=Columns(text="review", label="stars"))
    assert "\n" not in str(error.value)


def test_columns_that_cannot_be_guessed() -> None:
    two = frame(kind=["a", "b"] * 30).rename(columns={"stars": "rating", "kind": "topic"})
    with pytest.raises(UserError, match="expected one column that can be the labels, found 'topic', 'rating'; name it"):
        open_dataset(two)
    assert open_dataset(two, columns=Columns(label="rating")).labels == tuple(NAMES)
    with pytest.raises(UserError, match=r"expected a column 'ratings' \(task.columns.label\), found.*rating"):
        open_dataset(two, columns=Columns(label="ratings"))
    with pytest.raises(UserError, match="expected a column of texts, found none"):
        open_dataset(pd.DataFrame({"a": [1, 2] * 30, "label": [0, 1] * 30}))
    with pytest.raises(UserError, match="expected a column for each meaning, found 'review' for two of them"):
        open_dataset(two, columns=Columns(text="review", id="review"))


def test_a_class_of_one_row_is_trained_and_said() -> None:
    own = frame(61)
    own.loc[60, "stars"] = "rare"
    dataset = open_dataset(own)
    assert by_text(dataset)[own.review[60]] == ("train", "rare")
    assert "validation has no rows of rare; test has no rows of rare" in dataset.notes


def test_a_folder_with_two_files_for_a_split(tmp_path: Path) -> None:
    frame().to_csv(tmp_path / "train.csv", index=False)
    frame().to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="expected one file for train, found train.csv and train.parquet"):
        open_dataset(str(tmp_path))


def test_judged_data_are_all_test_rows_of_any_classes() -> None:
    own = frame(5, ["good"])
    dataset = open_dataset(own, whole=True)
    assert (dataset.labels, [row.label for row in dataset.rows("test")]) == (("good",), [0] * 5)
    assert [*dataset.splits] == ["test"]
    recorded = Columns(text="review", label="stars", group="author", id="nr")
    assert open_dataset(own, columns=recorded, whole=True).splits == dataset.splits
    alone = open_dataset(own[["review"]], whole=True)
    assert alone.kind == "language_modelling" and [row.text for row in alone.rows("test")] == own.review.tolist()


def test_rows_in_memory() -> None:
    texts = [f"text number {i}" for i in range(40)]
    dataset = dataset_from_rows(texts, [i % 2 == 0 for i in range(40)], ids=[f"r{i}" for i in range(40)])
    assert dataset.labels == ("False", "True")
    assert {n: len(rows) for n, rows in dataset.splits.items()} == {"train": 32, "validation": 4, "test": 4}
    found = {row.id: row for rows in dataset.splits.values() for row in rows}
    assert {i: (found[f"r{i}"].text, found[f"r{i}"].label) for i in range(40)} == {
        i: (text, int(i % 2 == 0)) for i, text in enumerate(texts)
    }
    pairs = dataset_from_rows(texts, [0, 1] * 20, texts2=texts[::-1], validation_fraction=0.2, test_fraction=0.25)
    assert {n: len(rows) for n, rows in pairs.splits.items()} == {"train": 22, "validation": 8, "test": 10}
    assert all(row.text2 == texts[40 - int(row.id)] for row in pairs.rows("train"))
    with pytest.raises(UserError, match="expected 40 values of label, found 3"):
        dataset_from_rows(texts, [0, 1, 1])


def test_rows_to_predict_keep_their_order_and_need_no_labels(tmp_path: Path) -> None:
    own = frame(7)
    own[["review"]].to_csv(tmp_path / "a.csv", index=False)
    rows, classes = rows_from_table(tmp_path / "a.csv", Columns(text="review", label="stars", id="id"), False)
    assert [(r.id, r.text, r.label) for r in rows] == [(str(i + 1), t, None) for i, t in enumerate(own.review)]
    assert classes == ()
    own.to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    rows, classes = rows_from_table(tmp_path / "b.jsonl", Columns(text="review", label="stars"), True)
    assert [classes[r.label or 0] for r in rows] == own.stars.tolist()
    with pytest.raises(UserError, match="expected a column 'review'"):
        own.rename(columns={"review": "text"}).to_csv(tmp_path / "c.csv")
        rows_from_table(tmp_path / "c.csv", Columns(text="review"), False)


def test_a_task_of_a_frame_says_what_was_guessed(caplog: pytest.LogCaptureFixture) -> None:
    task = load_task(TaskConfig(frame(), "letter"), qwen_style())  # type: ignore[arg-type]
    assert task.classes == tuple(NAMES) and len(task.encode("test").examples) == 6
    assert "text 'review' (guessed), label 'stars' (guessed)" in caplog.text
    assert task.describe()["columns"] == {"text": "review", "label": "stars"}
    json.dumps(task.describe())


def test_columns_of_a_config_and_its_fractions(tmp_path: Path) -> None:
    frame(100).to_csv(tmp_path / "a.csv", index=False)
    config = TaskConfig(str(tmp_path / "a.csv"), "letter", columns=Columns(text="review"), test_fraction=0.3)
    dataset, validation = settled_dataset(config)
    assert {n: len(rows) for n, rows in dataset.splits.items()} == {"train": 61, "validation": 9, "test": 30}
    assert "by the hash of their text" in validation
    few = settled_dataset(replace(config, limit_test=5))[0].rows("test")
    assert len(few) == 5 and all(row in dataset.rows("test") for row in few)
    with pytest.raises(UserError, match="expected different columns for text, text2 and label"):
        TaskConfig("a.csv", "letter", columns=Columns(text="a", label="a"))
    with pytest.raises(UserError, match="leave rows for train"):
        settled_dataset(replace(config, validation_fraction=0.8))


def test_a_folder_with_meta_json_is_read_as_before(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"id": str(i), "text": f"{split} {i}", "label": i % 2} for i in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "meta.json").write_text(json.dumps({"task": "classification", "labels": ["no", "yes"]}))
    dataset = open_dataset(str(tmp_path))
    assert dataset.labels == ("no", "yes") and dataset.columns == {}
    (tmp_path / "meta.json").unlink()
    assert open_dataset(str(tmp_path)).labels == ("0", "1")


def test_the_example_of_the_page_runs() -> None:
    (block,) = fenced("python", (ROOT / "docs/how-to/own-data.md").read_text())
    names: dict[str, Any] = {}
    exec(block, names)
    task = load_task(names["config"], qwen_style())
    assert task.classes == ("1", "5")
    assert {n: len(rows) for n, rows in task.dataset.splits.items()} == {"train": 80, "validation": 10, "test": 10}
