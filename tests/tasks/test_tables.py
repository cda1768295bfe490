"""Tables from files and from memory as columns of plain values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loracurve.system.errors import UserError
from loracurve.tasks.tables import Table, table_of, table_of_file


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(delimiter: str, newline: str, encoding: str, tmp_path: Path) -> None:
    rows = [
        ["text", "label"],
        ['"one, two; three\tfour"', "a"],
        [f'"two{newline}lines"', "b"],
        ['"a ""quoted"" word"', ""],
        ["schön", "NA"],
    ]
    text = newline.join(delimiter.join(row) for row in rows)
    table = table_of_file(write(tmp_path / "rows.csv", text, encoding))
    assert table.columns == {
        "text": ["one, two; three\tfour", f"two{newline}lines", 'a "quoted" word', "schön"],
        "label": ["a", "b", None, "NA"],
    }
    assert list(table.lines) == [2, 3, 5, 6]


def test_csv_of_pandas_with_its_index(tmp_path: Path) -> None:
    pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}).to_csv(tmp_path / "rows.csv")
    assert table_of_file(tmp_path / "rows.csv").columns == {"text": ["a", "b"], "label": ["0", "1"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the names of the columns in the first line, found an empty file"),
        (b"text,label\n", "expected at least one row, found none"),
        (b"text,label\na,b\nc\n", "line 3: expected 2 values, as there are columns, found 1"),
        (b'text,label\n"a\nb",x\nc,d,e\n', "line 4: expected 2 values, as there are columns, found 3"),
        (b'text,label\nx,y\n"never closed,1\nb,2\n', "line 3: expected values that are quoted as in CSV"),
        (b'text,label\n"a"b,1\n', "line 2: expected values that are quoted as in CSV"),
        (b"text,text\na,b\n", "found two called 'text'"),
        (b"text,,label\na,b,c\n", "found none for column 2"),
        ("text,label\nschön,1\n".encode("latin-1"), "expected UTF-8 text, found a byte"),
        ("text,label\na,1\n".encode("utf-16"), "found UTF-16 or no text"),
        ("text,label\na,1\n".encode("utf-16-le"), "found UTF-16 or no text"),
    ],
)
def test_csv_that_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        table_of_file(tmp_path / "rows.csv")
    assert "\n" not in str(error.value)


def test_a_long_text_and_one_that_is_too_long(tmp_path: Path) -> None:
    long = "word " * 100_000
    assert table_of_file(write(tmp_path / "a.csv", f"text,y\n{long},1\n")).columns["text"] == [long]
    with pytest.raises(UserError, match="line 2: expected at most"):
        table_of_file(write(tmp_path / "b.csv", f"text,y\n{'x' * (2**24 + 1)},1\n"))


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json"])
def test_json_lines_and_a_list(ending: str, tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": None, "more": True}]
    lines = write(tmp_path / f"rows.{ending}", "".join(json.dumps(r) + "\n\n" for r in rows))
    expected = {"text": ["a", "b"], "n": [1, None], "more": [None, True]}
    table = table_of_file(lines)
    assert (table.columns, table.lines) == (expected, [1, 3])
    assert table_of_file(write(tmp_path / "list.json", json.dumps(rows))).columns == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": 1', "line 1: expected JSON, found broken JSON"),
        ("[1, 2]", "row 1: expected a JSON object"),
        ('{"a": 1}\n3\n', "line 2: expected a JSON object"),
        ("[" * 100_000, "broken JSON"),
    ],
)
def test_json_that_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        table_of_file(write(tmp_path / "rows.json", text))


def test_parquet_and_frames_give_the_same(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "text": ["a", None, "c"],
            "whole": [1, 2, 3],
            "gap": [1.0, np.nan, 3.0],
            "yes": [True, False, True],
            "kind": pd.Categorical(["x", "y", "x"]),
        }
    )
    frame.to_parquet(tmp_path / "rows.parquet")
    expected = {
        "text": ["a", None, "c"],
        "whole": [1, 2, 3],
        "gap": [1.0, None, 3.0],
        "yes": [True, False, True],
        "kind": ["x", "y", "x"],
    }
    assert table_of_file(tmp_path / "rows.parquet").columns == expected
    found = table_of(frame)
    assert isinstance(found, Table) and found.columns == expected


def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a" * 100] * 50}), tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(content[:40] + b"\xff" * 20 + content[60:-20])
    with pytest.raises(UserError, match="damaged"):
        table_of_file(tmp_path / "rows.parquet")


def test_parquet_whose_text_is_not_utf8(tmp_path: Path) -> None:
    array = pa.array([b"sch\xf6n"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": array}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="expected UTF-8 text in column 'text'"):
        table_of_file(tmp_path / "rows.parquet")


def test_data_sets_in_memory_and_in_parquet_keep_the_names_of_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    table = table_of(data.select([2, 1]))
    assert isinstance(table, Table)
    assert table.columns == {"text": ["c", "b"], "label": [1, 0]}
    assert table.classes == {"label": ["no", "yes"]}
    data.to_parquet(tmp_path / "rows.parquet")
    assert table_of_file(tmp_path / "rows.parquet").classes == {"label": ["no", "yes"]}
    parts = table_of(datasets.DatasetDict({"train": data, "test": data.select([0])}))
    assert isinstance(parts, dict) and {name: len(part) for name, part in parts.items()} == {"train": 3, "test": 1}


@pytest.mark.parametrize("data", [[{"text": "a"}], 3, {"text": ["a"]}])
def test_other_things_are_refused(data: object) -> None:
    with pytest.raises(UserError, match="expected a path, a pandas.DataFrame"):
        table_of(data)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file"):
        table_of_file(tmp_path / "rows.csv")
    with pytest.raises(UserError, match="expected a file that ends in .csv"):
        table_of_file(write(tmp_path / "rows.xlsx", "text"))
