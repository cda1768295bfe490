"""Rows and folders of data, and errors by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.places import PREPARED
from helpers.texts import write_lines
from hypothesis import given
from hypothesis import strategies as st

from loracurve.system.errors import UserError
from loracurve.tasks.dataset import Row, as_text, read_dataset, read_rows, split_validation, subset

GOOD = {"id": "a", "text": "fine", "label": 1}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{'id'", "broken JSON"),
        ([1], "JSON object"),
        ({"text": "x", "label": 0}, "string 'id'"),
        ({"id": "b", "txt": "x", "label": 0}, "did you mean 'txt'"),
        ({"id": "b", "text": 3, "label": 0}, "'text' as text"),
        ({"id": "b", "text": " ", "label": 0}, "not blank"),
        ({"id": "b", "text": "x", "label": 2}, "label from 0 to 1, found 2"),
        ({"id": "b", "text": "x", "label": -1}, "label from 0 to 1"),
        ({"id": "b", "text": "x", "label": True}, "whole number"),
        ({"id": "b", "text": "x", "label": "1"}, "whole number"),
        ({"id": "b", "text": "x"}, "found none"),
        ({"id": "a", "text": "x", "label": 0}, "used on line 1"),
        ('{"id": "b", "text": "x", "label": 0, "label": 1}', "the field 'label' stands twice"),
        ({"id": "b\ud800", "text": "x", "label": 0}, "'id': expected text, found half of a surrogate pair ('\\ud800')"),
        ({"id": "b", "text": "x\udc00", "label": 0}, "'text': expected text, found half of a surrogate pair"),
        ({"id": "b", "text": "x", "text2": "\ud800y", "label": 0}, "'text2': expected text, found half"),
    ],
)
def test_row_errors_name_file_and_line(tmp_path: Path, record: Any, said: str) -> None:
    path = write_lines(tmp_path / "train.jsonl", [GOOD, record])
    with pytest.raises(UserError, match="line 2") as caught:
        read_rows(path, "classification", ("no", "yes"))
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": "yes"}, "list of strings"),
        ({"choices": ["one"]}, "2 to 26 choices"),
        ({"choices": ["a", 2]}, "list of strings"),
        ({"label": 2}, "label from 0 to 1"),
        ({"question": None}, "'question'"),
        ({"choices": ["a", "b\ud83d"]}, "'choices', 2: expected text, found half of a surrogate pair"),
        ({"context": "\ude00"}, "'context': expected text, found half"),
    ],
)
def test_multiple_choice_errors(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    row = {"id": "q", "question": "why?", "choices": ["a", "b"], "label": 0} | change
    with pytest.raises(UserError, match="line 1") as caught:
        read_rows(write_lines(tmp_path / "x.jsonl", [row]), "multiple_choice")
    assert said in str(caught.value)


def test_labels_may_be_absent_only_where_they_are_not_needed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"id": 7, "text": "x"}, "", {"id": "b", "text": "y", "label": None}])
    assert [row.label for row in read_rows(path, "classification", ("n", "y"), require_labels=False)] == [None, None]
    assert read_rows(path, "classification", ("n", "y"), require_labels=False)[0].id == "7"


def test_language_modelling_rows_are_texts_or_prompts_with_completions(tmp_path: Path) -> None:
    # A table written as JSON has null where a row lacks a column.
    records = [
        {"id": "t", "text": "x y", "prompt": None, "completion": None},
        {"id": "p", "text": None, "prompt": "x", "completion": "y"},
        {"id": "q", "text": None, "prompt": "x", "completion": None},
    ]
    path = write_lines(tmp_path / "x.jsonl", records)
    rows = read_rows(path, "language_modelling", require_labels=False)
    assert rows == [Row("t", text="x y"), Row("p", prompt="x", completion="y"), Row("q", prompt="x")]
    for record, said in (
        (records[0] | {"prompt": "x"}, "expected 'text', or 'prompt' and 'completion', found 'text' and 'prompt'"),
        (records[2], "'completion' as text"),
        ({"id": "s", "prompt": "\ud800", "completion": "y"}, "'prompt': expected text, found half"),
        ({"id": "s", "prompt": "x", "completion": "\ud800"}, "'completion': expected text, found half"),
    ):
        with pytest.raises(UserError, match="line 1") as caught:
            read_rows(write_lines(path, [record]), "language_modelling")
        assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "end"), [(b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n"), (b"\n", b"\r")], ids=["BOM", "CRLF", "CR"]
)
def test_lines_end_as_any_editor_writes_them_and_nowhere_else(tmp_path: Path, start: bytes, end: bytes) -> None:
    texts = ["a\u2028b", "a\u0085b\u000bc", "\U0001f600", "\u00e9", "e\u0301"]
    records = [{"id": str(i), "text": text, "label": 0} for i, text in enumerate(texts)]
    path = tmp_path / "x.jsonl"
    path.write_bytes(start + b"".join(json.dumps(r, ensure_ascii=False).encode() + end for r in records))
    assert [row.text for row in read_rows(path, "classification", ("n", "y"))] == texts
    path.write_bytes(b"".join(json.dumps(r).encode() + end for r in records))  # escapes: a whole surrogate pair
    assert [row.text for row in read_rows(path, "classification", ("n", "y"))] == texts


def make_folder(folder: Path, **meta: Any) -> Path:
    for split in ("train", "test"):
        write_lines(folder / f"{split}.jsonl", [GOOD])
    (folder / "meta.json").write_text(json.dumps({"task": "classification", "labels": ["n", "y"]} | meta))
    return folder


def test_folder_errors(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "d")
    assert read_dataset(folder).name == "d" and "validation" not in read_dataset(folder).splits
    (folder / "validation.jsonl").write_text("")
    with pytest.raises(UserError, match="empty file"):
        read_dataset(folder)
    make_folder(folder, sizes={"validation": 0})
    assert "validation" not in read_dataset(folder).splits
    with pytest.raises(UserError, match="did you mean 'test'"):
        read_dataset(folder).rows("tests")
    (folder / "test.jsonl").unlink()
    with pytest.raises(UserError, match="no file"):
        read_dataset(folder)
    for meta, said in (
        ({"task": "clasification"}, "did you mean 'classification'"),
        ({"labels": ["n"]}, "two different"),
        ({"labels": ["n", " "]}, "list of names"),
        ({"labels": ["n", "\ud800"]}, "meta.json, 'labels': expected text, found half of a surrogate pair"),
        ({"notes": "\ud800"}, "meta.json, 'notes': expected text"),
    ):
        with pytest.raises(UserError, match=said):
            read_dataset(make_folder(folder, **meta))
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match="meta.json"):
        read_dataset(folder)
    with pytest.raises(UserError, match="no folder"):
        read_dataset(tmp_path / "absent")


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_validation_split_depends_on_ids_alone(size: int, fraction: float, seed: int) -> None:
    rows = [Row(str(i), 0, text="x") for i in range(size)]
    train, validation = split_validation(rows, fraction, seed)
    assert train and validation and not set(train) & set(validation) and len(train) + len(validation) == size
    assert set(split_validation(rows[::-1], fraction, seed)[1]) == set(validation)
    assert set(subset(rows, size // 2, seed)) <= set(subset(rows, size // 2 + 1, seed))


def test_plain_text_of_every_kind() -> None:
    assert as_text(Row("1", text="a", text2="b")) == "a b"
    assert as_text(Row("1", question="q", choices=("x", "y"), context="c")) == "c q"
    assert as_text(Row("1", prompt="p ", completion="c")) == "p c"


def test_all_shared_data_sets_load() -> None:
    if not PREPARED.is_dir():
        pytest.skip("the project's shared data are not here")
    folders = [folder for folder in sorted(PREPARED.iterdir()) if (folder / "meta.json").is_file()]
    assert folders
    for folder in folders:
        sizes = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["sizes"]
        splits = read_dataset(folder).splits
        assert {split: len(rows) for split, rows in splits.items()} == {s: n for s, n in sizes.items() if n}, folder
