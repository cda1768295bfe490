"""Tables from strangers: CSV, Parquet and JSON lines, frames and data sets in memory, as columns of plain values."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from loracurve.system.errors import UserError, nearest, one_line
from loracurve.system.files import once
from loracurve.system.paths import is_file, opened, read_text
from loracurve.system.tables import read_table
from loracurve.tasks.dataset import MOST_CHARACTERS

__all__ = ["ENDINGS", "Table", "in_memory", "is_number", "table_of", "table_of_file"]

ENDINGS = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json")
"""names of files that hold tables"""

DELIMITERS = (",", ";", "\t")

MOST_COLUMNS = 10_000

_LOOKED_AT = 2**20
"""characters from which the delimiter is told"""


@dataclass(frozen=True)
class Table:
    """Columns of one length by name; None stands for a value that is missing.

    `where` begins messages; `lines` are the line of each row in its file, where it has lines. `classes` are the names
    that the whole numbers of a column stand for (`ClassLabel` of ``datasets``).
    """

    where: str
    columns: Mapping[str, list[Any]]
    lines: Sequence[int] = ()
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def place(self, row: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.where}, line {self.lines[row]}" if self.lines else f"{self.where}, row {row + 1}"

    def column(self, name: str, meaning: str) -> list[Any]:
        """The values of a column; raises UserError naming the columns there are."""
        if name not in self.columns:
            known = ", ".join(map(repr, [*self.columns][:20]))
            raise UserError(
                f"{self.where}: expected a column {name!r} (task.columns.{meaning}), found {known}"
                f"{nearest(name, self.columns)}"
            )
        return self.columns[name]


def table_of_file(path: str | Path) -> Table:
    """Read a table by the ending of its name (`ENDINGS`).

    Raises:
        UserError: no such file, another ending, text that is not UTF-8, rows of other lengths than the first (with the
            line), broken JSON, a damaged Parquet file, a table without rows.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if not is_file(path):
        raise UserError(f"expected a file of rows, found no file {path}")
    if ending not in ENDINGS:
        raise UserError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}, found {path.suffix!r}; rename it")
    if ending == ".parquet":
        table = _of_arrow(read_table(path), str(path))
    elif ending in (".csv", ".tsv"):
        table = _of_csv(path, "\t" if ending == ".tsv" else None)
    else:
        table = _of_json(path)
    return _with_rows(table)


def in_memory(data: object) -> bool:
    """Whether it is a pandas.DataFrame, a datasets.Dataset or a datasets.DatasetDict."""
    return isinstance(data, pd.DataFrame) or _is_of_datasets(data, "Dataset", "DatasetDict")


def table_of(data: Any, where: str | None = None) -> Table | dict[str, Table]:
    """The table of a frame or a data set in memory; of a `DatasetDict` one for each split.

    Raises:
        UserError: something else, columns of the same name, no rows.
    """
    if isinstance(data, pd.DataFrame):
        names = [str(name) for name in data.columns]
        _check_names(names, where or "DataFrame")
        columns = {name: _plain(data.iloc[:, i]) for i, name in enumerate(names)}
        return _with_rows(Table(where or "DataFrame", columns))
    if _is_of_datasets(data, "DatasetDict"):
        return {str(split): _of_datasets(part, f"DatasetDict, {split}") for split, part in data.items()}
    if _is_of_datasets(data, "Dataset"):
        return _of_datasets(data, where or "Dataset")
    raise UserError(
        f"data: expected a path, a pandas.DataFrame, a datasets.Dataset or a DatasetDict, found {type(data).__name__}"
    )


def _is_of_datasets(data: object, *names: str) -> bool:
    # Whoever has such an object has imported the package, which takes a second.
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, tuple(getattr(module, name) for name in names))


def _of_datasets(data: Any, where: str) -> Table:
    names = {name: list(kind.names) for name, kind in data.features.items() if hasattr(kind, "names")}
    table = _of_arrow(data.with_format("arrow")[:], where)
    return _with_rows(Table(where, table.columns, (), names))


def _plain(series: pd.Series) -> list[Any]:
    """The values of a column of a frame: None for what pandas takes for missing."""
    return [None if gone else value for value, gone in zip(series.tolist(), series.isna().tolist(), strict=True)]


def _with_rows(table: Table) -> Table:
    if not len(table):
        raise UserError(f"{table.where}: expected at least one row, found none")
    return table


def _check_names(names: Sequence[str], where: str) -> None:
    """Refuse two columns of one name."""
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise UserError(f"{where}: expected columns of different names, found two called {twice!r}; rename one")
    if len(names) > MOST_COLUMNS:
        raise UserError(f"{where}: expected at most {MOST_COLUMNS} columns, found {len(names)}")


def _of_arrow(table: pa.Table, where: str) -> Table:
    """Columns of text, numbers and booleans; others (lists, images) are left out."""
    try:
        _check_names(table.column_names, where)
    except UnicodeDecodeError:
        raise UserError(f"{where}: expected names of columns in UTF-8, found other bytes; write it again") from None
    columns = {}
    for name, values in zip(table.column_names, table.columns, strict=True):
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        tests = ("string", "large_string", "string_view", "integer", "floating", "boolean", "null")
        if any(getattr(pa.types, f"is_{test}")(kind) for test in tests):
            try:
                columns[name] = [None if isinstance(v, float) and v != v else v for v in values.to_pylist()]
            except (UnicodeDecodeError, pa.ArrowException) as error:
                raise UserError(
                    f"{where}: expected UTF-8 text in column {name!r}, found something else ({one_line(error, 160)}); "
                    "write it again"
                ) from None
    return Table(where, columns, (), _class_labels(table.schema.metadata or {}))


def _class_labels(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Names of classes that `datasets` writes into a Parquet file."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found = {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return {}
    return {
        n: names for n, names in found.items() if isinstance(names, list) and all(isinstance(x, str) for x in names)
    }


def _of_json(path: Path) -> Table:
    """One object on each line, or one list of objects."""
    rows: list[Mapping[str, Any]] = []
    lines: list[int] = []
    if path.suffix.lower() == ".json" and (text := read_text(path)).lstrip().startswith("["):
        for number, record in enumerate(_json(text, str(path)), start=1):
            rows.append(_record(record, f"{path}, row {number}"))
    else:
        with opened(path, mode="r", encoding="utf-8-sig") as file:
            for number, line in _lines(file, path):
                if line.strip():
                    rows.append(_record(_json(line, f"{path}, line {number}"), f"{path}, line {number}"))
                    lines.append(number)
    names = [*dict.fromkeys(name for row in rows for name in row)]
    _check_names(names, str(path))
    if len(names) * len(rows) > 100 * sum(map(len, rows)) + 10**6:
        raise UserError(f"{path}: expected rows with the same fields, found {len(names)} different ones")
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(str(path), columns, lines)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=once)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: expected JSON, found broken JSON ({getattr(error, 'msg', error)})") from None


def _record(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object with the fields of a row, found {type(value).__name__}")
    return value


def _lines(file: IO[str], path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; raises UserError for one that is too long, and for other text than UTF-8."""
    number = 0
    while True:
        try:
            line = file.readline(MOST_CHARACTERS + 1)
        except UnicodeDecodeError:
            raise UserError(
                f"{path}: expected UTF-8 text, found a byte after line {number} that is not (Latin-1 or Windows-1252?);"
                f" save it as UTF-8, such as by iconv -f WINDOWS-1252 -t UTF-8"
            ) from None
        if not line:
            return
        number += 1
        if len(line) > MOST_CHARACTERS:
            raise UserError(f"{path}, line {number}: expected at most {MOST_CHARACTERS} characters, found more")
        yield number, line


def _of_csv(path: Path, delimiter: str | None) -> Table:
    """A file with the names of its columns in the first line. Quoted values may hold delimiters and newlines."""
    with opened(path) as head:
        start = head.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise UserError(
            f"{path}: expected UTF-8 text, found UTF-16 or no text; save it as UTF-8, such as by iconv -f UTF-16 -t "
            "UTF-8"
        )
    csv.field_size_limit(max(csv.field_size_limit(), MOST_CHARACTERS))
    if delimiter is None:
        delimiter = _delimiter(path)
    header: list[str] | None = None
    rows: list[list[str]] = []
    lines: list[int] = []
    with opened(path, mode="r", encoding="utf-8-sig", newline="") as file:
        records = csv.reader((line for _, line in _lines(file, path)), delimiter=delimiter, strict=True)
        while True:
            first = records.line_num + 1
            try:
                record = next(records, None)
            except csv.Error as error:
                raise UserError(
                    f"{path}, line {first}: expected values that are quoted as in CSV, found {one_line(error)}; write a"
                    ' quote within a value twice ("") and close each quote'
                ) from None
            if record is None:
                break
            if not record or (header is not None and len(header) > 1 and record == [""]):
                continue
            if header is None:
                header = [name.strip() for name in record]
                continue
            if len(record) != len(header):
                raise UserError(
                    f"{path}, line {first}: expected {len(header)} values, as there are columns, found {len(record)}; "
                    "quote values that hold a delimiter"
                )
            rows.append(record)
            lines.append(first)
    if header is None:
        raise UserError(f"{path}: expected the names of the columns in the first line, found an empty file")
    # A table without rows has its columns nonetheless.
    values = [[*column] for column in zip(*rows, strict=True)] if rows else [[] for _ in header]
    kept = {}
    for place, (name, column) in enumerate(zip(header, values, strict=True)):
        if name:
            kept[place] = [value or None for value in column]
        elif place and any(column):  # a first one without a name is pandas' index
            raise UserError(f"{path}, line 1: expected a name for each column, found none for column {place + 1}")
    names = [header[place] for place in kept]
    _check_names(names, str(path))
    return Table(str(path), dict(zip(names, kept.values(), strict=True)), lines)


def _delimiter(path: Path) -> str:
    """The delimiter by which the first rows have the same number of columns, the most of them."""
    with opened(path, mode="r", encoding="utf-8-sig", newline="", errors="replace") as file:
        text = file.read(_LOOKED_AT)
    if len(text) == _LOOKED_AT:  # without the line that is cut
        text = text[: text.rfind("\n") + 1] or text
    best, found = (False, 1), ","
    for delimiter in DELIMITERS:
        counts = []
        try:
            for record in csv.reader(re.findall(r"[^\n]*\n|[^\n]+", text), delimiter=delimiter, strict=True):
                if record:
                    counts.append(len(record))
                if len(counts) == 100:
                    break
        except csv.Error:
            pass  # a quote that is cut, or the reader says it with its line
        score = (len(set(counts)) == 1, counts[0] if counts else 1)
        if score[1] > 1 and score > best:
            best, found = score, delimiter
    return found


def is_number(value: object) -> bool:
    """Whether it is a number of Python or numpy, and no boolean."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
