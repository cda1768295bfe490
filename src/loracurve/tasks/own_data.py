"""Data sets of people's own tables: which columns are what, classes by name, and splits where there are none.

Guesses are made by names and by content, said in `Dataset.notes`, and recorded in `Dataset.columns`. Classes have the
names that stand in the column of labels, so that files that hold fewer of them, or in another order, mean the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loracurve.system.errors import UserError, one_line
from loracurve.system.paths import entries, is_file, is_folder
from loracurve.tasks.config import Columns
from loracurve.tasks.dataset import Dataset, Row, check_rows, check_text
from loracurve.tasks.repeats import bare
from loracurve.tasks.splitting import divide
from loracurve.tasks.tables import ENDINGS, Table, is_number, table_of, table_of_file

__all__ = ["dataset_from_rows", "dataset_from_tables", "holds_tables", "rows_from_table"]

_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}

# Names of columns by what they mean, the surest first.
_TEXTS = (
    *("text", "sentence", "review", "review_text", "content", "message", "comment", "comment_text", "tweet", "body"),
    *("document", "utterance", "query", "question", "description", "headline", "title", "abstract", "article", "post"),
)
_PAIRS = (
    *(("text", "text2"), ("text1", "text2"), ("text_1", "text_2"), ("sentence1", "sentence2")),
    *(("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"), ("text", "text_pair")),
)
_SURE_LABELS = ("label", "labels", "class", "target", "y")
_LABELS = (
    *("label_text", "label_name", "category", "sentiment", "intent", "topic", "stars", "rating", "polarity", "emotion"),
    *("is_spam", "spam", "tag", "type", "answer", "gold_label", "airline_sentiment", "score", "outcome", "status"),
)

_MOST_GUESSED = 50
"""classes of a column that is taken for the labels without its name saying so"""

_MOST_SCALE = 20
"""classes that are fractions: more are taken for measurements"""

_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.0+)?")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")


def holds_tables(folder: str | Path) -> bool:
    """Whether a folder has train.csv or its like, and no meta.json."""
    return not is_file(Path(folder) / "meta.json") and bool(_files_of(folder)["train"])


def dataset_from_tables(
    data: Any,
    columns: Columns | None = None,
    *,
    name: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    whole: bool = False,
) -> Dataset:
    """A classification from tables; from texts alone a data set of language modelling.

    Args:
        data: a file (`tables.ENDINGS`), a folder with train.csv or its like and perhaps validation and test, a
            pandas.DataFrame, a datasets.Dataset or a datasets.DatasetDict.
        columns: which column is what. Columns that it does not name are guessed, groups never.
        name: of the data set. Default: of the file or folder.
        validation_fraction: share of the rows that becomes validation where there is no such split.
        test_fraction: the same for test.
        seed: of both.
        whole: the data are to be judged and not to be learnt: one table is all of the split test, and may hold one
            class or no labels.

    Raises:
        UserError: files that cannot be read, columns that are not there or cannot be guessed, rows without text or
            label, fewer than two classes, a class of other splits that train does not have, labels that look like
            measurements, ids that stand twice.
    """
    tables, name = _tables(data, name)
    train = tables.get("train") or next(iter(tables.values()))
    given = columns or Columns()
    if whole:  # a run's rows had groups and ids, which new ones need not have
        given = replace(given, group=None, id=given.id if given.id in train.columns else None)
    found, how = _found(tables, train, given, whole)
    left_out: list[str] = []
    if found.label is not None:
        for split in [s for s in tables if tables[s] is not train]:
            table = tables[split]
            if found.label not in table.columns or all(v is None for v in _names(table, found.label)):
                left_out.append(f"{split} without labels left out")
                del tables[split]
    values = {split: _names(table, found.label) if found.label else [] for split, table in tables.items()}
    lm = found.label is None
    classes = () if lm else _classes(tables, values, found.label or "", whole)
    rows = {
        split: _rows(table, found, values[split] if not lm else None, classes, split) for split, table in tables.items()
    }
    notes = [f"columns: {', '.join(how)}", *left_out]
    if not whole:
        rows, drawn = _divided(rows, train, found, (validation_fraction, test_fraction), seed, classes)
        notes += drawn
    elif len(tables) == 1:
        rows = {"test": next(iter(rows.values()))}
    kind = "language_modelling" if lm else "classification"
    mapping = {k: v for k, v in vars(found).items() if v is not None}
    return Dataset(name, kind, classes, rows, "; ".join(notes), "", mapping)  # type: ignore[arg-type]


def dataset_from_rows(
    texts: Sequence[str],
    labels: Sequence[Any],
    *,
    name: str = "rows",
    texts2: Sequence[str] | None = None,
    groups: Sequence[Any] | None = None,
    ids: Sequence[Any] | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """A classification of rows in memory, with train, validation and test by the hash of the texts, by class.

    Args:
        texts: [n], none blank.
        labels: [n] text, whole numbers or booleans, none missing. Classes are named as they are written, in the order
            of numbers or of the alphabet.
        name: of the data set.
        texts2: [n] second texts of pairs.
        groups: [n] rows of the same group go to the same split, beside rows of the same text; None: in no group.
        ids: [n] none twice. Default: 1 to n.
        validation_fraction: share of the rows.
        test_fraction: share of the rows.
        seed: of the draw.

    Raises:
        UserError: as `dataset_from_tables`, and sequences of other lengths.
    """
    given = {"text": texts, "label": labels, "text2": texts2, "group": groups, "id": ids}
    columns = {meaning: list(values) for meaning, values in given.items() if values is not None}
    wrong = next((m for m, values in columns.items() if len(values) != len(columns["text"])), None)
    if wrong is not None:
        raise UserError(f"{name}: expected {len(columns['text'])} values of {wrong}, found {len(columns[wrong])}")
    parts = {"validation_fraction": validation_fraction, "test_fraction": test_fraction, "seed": seed}
    table = Table(name, columns)
    return dataset_from_tables(table, Columns(**{m: m for m in columns}), name=name, **parts)  # type: ignore[arg-type]


def rows_from_table(
    path: str | Path, columns: Columns, labelled: bool, second: bool = False
) -> tuple[list[Row], tuple[str, ...]]:
    """Rows of one file by the columns of a run, in their order, and the names of the classes that they have.

    Args:
        path: a file (`tables.ENDINGS`).
        columns: of the run; where it was fitted to rows without columns, these are text, text2, label and id.
        labelled: whether rows need a label; else none is read.
        second: whether the run's rows have a second text.
    """
    table = table_of_file(path)
    if columns.text is None:
        there = {m: m for m in ("label", "id") if m in table.columns}
        columns = Columns(text="text", text2="text2" if second else None, **there)
    if columns.id is not None and columns.id not in table.columns:
        columns = replace(columns, id=None)
    if labelled and columns.label is None:
        raise UserError(f"{table.where}: expected a column of labels, called label, found {', '.join(table.columns)}")
    values = _names(table, columns.label) if labelled and columns.label else None
    classes = () if values is None else _classes({"test": table}, {"test": values}, columns.label or "", True)
    return _rows(table, columns, values, classes, "rows"), classes


def _tables(data: Any, name: str | None) -> tuple[dict[str, Table], str]:
    """The tables of each split that is there, one of a single table under train, and a name for all."""
    if isinstance(data, Table):
        return {"train": data}, name or data.where
    if not isinstance(data, str | Path):
        found = table_of(data)
        if isinstance(found, Table):
            return {"train": found}, name or "rows"
        chosen = {ours: found[n] for ours, names in _SPLITS.items() for n in names[::-1] if n in found}
        if "train" not in chosen:
            raise UserError(f"DatasetDict: expected a split 'train', found {', '.join(found)}")
        return chosen, name or "rows"
    if not is_folder(data):
        return {"train": table_of_file(data)}, name or Path(data).stem
    tables = {}
    for split, files in _files_of(data).items():
        if len(files) > 1:
            raise UserError(f"{data}: expected one file for {split}, found {files[0].name} and {files[1].name}")
        if files:
            tables[split] = table_of_file(files[0])
    if "train" not in tables:
        raise UserError(f"{data}: expected train.csv, train.parquet or train.jsonl, found none")
    return tables, name or Path(data).resolve().name


def _files_of(folder: str | Path) -> dict[str, list[Path]]:
    there = [path for path in entries(folder) if path.suffix.lower() in ENDINGS]
    return {split: [p for p in there if p.stem.lower() in names] for split, names in _SPLITS.items()}


def _found(tables: Mapping[str, Table], table: Table, given: Columns, whole: bool) -> tuple[Columns, list[str]]:
    """Which column is what by the table that is learnt from, and how it is known, for the log."""
    for meaning, column in vars(given).items():
        if column is not None:
            table.column(column, meaning)
    named = [c for c in vars(given).values() if c is not None and c != given.group]
    if twice := [c for c in named if named.count(c) > 1]:
        raise UserError(f"{table.where}: expected a column for each meaning, found {twice[0]!r} for two of them")
    found, taken = given, set(named)
    by_name = {name.casefold(): name for name in [*table.columns][::-1]}
    if found.text is None:
        first, second = _text_columns(table, by_name, taken | {given.group})
        found = replace(found, text=first, text2=found.text2 or second)
        taken |= {first, found.text2 or first}
    if found.id is None and by_name.get("id", "") not in {*taken, ""} and _tell_rows(tables, by_name["id"]):
        found = replace(found, id=by_name["id"])
        taken.add(by_name["id"])
    if found.label is None:
        rest = [c for c in table.columns if c not in taken and c != given.group and c.casefold() != "id"]
        label = _label_column(table, by_name, rest, whole)
        found = replace(found, label=label)
    how = [f"{m} {c!r}" + " (guessed)" * (getattr(given, m) is None) for m, c in vars(found).items() if c is not None]
    return found, how if found.id else [*how, "ids are row numbers"]


def _tell_rows(tables: Mapping[str, Table], column: str) -> bool:
    """Whether a column has another value in each row of each table."""
    values = [table.columns.get(column, [None]) for table in tables.values()]
    return all(None not in v and len(set(map(str, v))) == len(v) for v in values)


def _text_columns(table: Table, by_name: Mapping[str, str], taken: set[str | None]) -> tuple[str, str | None]:
    free = {low: name for low, name in by_name.items() if name not in taken and _length(table.columns[name])}
    for first, second in _PAIRS:
        if first in free and second in free:
            return free[first], free[second]
    named = [free[name] for name in _TEXTS if name in free]
    if named and named[0].casefold() == "text":
        return named[0], None
    # Else the longest, of those with a telling name or of those that read like texts.
    texts = [n for n in free.values() if _length(table.columns[n]) >= 12 and _share_of_distinct(table.columns[n]) > 0.5]
    candidates = named or texts
    if not candidates:
        known = ", ".join(map(repr, [*table.columns][:20]))
        raise UserError(
            f"{table.where}: expected a column of texts, found none that looks like it among {known}; name it by "
            "task.columns.text (the first line of a CSV file has the names of its columns)"
        )
    return max(candidates, key=lambda n: _length(table.columns[n])), None


def _length(values: Sequence[Any]) -> float:
    """Mean length of the texts of a column in characters; 0 for one of other values."""
    texts = [v for v in values[:1000] if v is not None]
    return sum(map(len, texts)) / len(texts) if texts and all(isinstance(v, str) for v in texts) else 0.0


def _share_of_distinct(values: Sequence[Any]) -> float:
    return len(set(map(str, values[:1000]))) / len(values[:1000])


def _label_column(table: Table, by_name: Mapping[str, str], rest: Sequence[str], whole: bool) -> str | None:
    """The column of labels, by its name or because no other can be it; None where there are only texts."""
    for name in _SURE_LABELS:
        if by_name.get(name) in rest:
            return by_name[name]
    distinct = {c: len({str(v) for v in table.columns[c] if v is not None}) for c in rest}
    found = [by_name[name] for name in _LABELS if by_name.get(name) in rest]
    if len(found) > 1:
        found = [c for c in found if distinct[c] > 1]
    if not found:
        found = [c for c in rest if 2 <= distinct[c] <= min(_MOST_GUESSED, len(table) / 2)]
    if len(found) == 1:
        return found[0]
    if whole or not rest:
        return None
    known = ", ".join(map(repr, (found or rest)[:20]))
    raise UserError(
        f"{table.where}: expected one column that can be the labels, found {known}; name it by task.columns.label"
    )


def _names(table: Table, column: str) -> list[str | None]:
    """The name of the class of each row, None where it is missing."""
    values, classes = table.column(column, "label"), table.classes.get(column)
    known: dict[Any, str | None] = {}
    names = []
    for number, value in enumerate(values):
        key = (type(value), value)
        try:
            if key not in known:
                known[key] = _class_name(value, classes)
        except (TypeError, ValueError):
            raise UserError(
                f"{table.place(number)}: expected {column!r} as text or a number, found {one_line(repr(value), 80)}"
            ) from None
        names.append(known[key])
    return names


def _class_name(value: Any, classes: Sequence[str] | None) -> str | None:
    """A label as the name of its class: 1, 1.0 and "1.0" are the class "1"."""
    if value is None or (is_number(value) and value != value):
        return None
    if classes is not None and is_number(value):
        if int(value) < 0:
            return None  # what hubs write for a label that is not public
        if value >= len(classes):
            raise ValueError
        return classes[int(value)]
    if is_number(value):
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    if isinstance(value, str):
        text = value.strip()
        return (str(int(float(text))) if _WHOLE.fullmatch(text) and len(text) < 16 else text) or None
    if type(value).__name__ in ("bool", "bool_"):
        return str(bool(value))
    raise TypeError


def _classes(
    tables: Mapping[str, Table], values: Mapping[str, Sequence[str | None]], column: str, whole: bool
) -> tuple[str, ...]:
    """Names of the classes in their order. Raises UserError where they cannot be learnt."""
    for split, table in tables.items():
        missing = [number for number, value in enumerate(values[split]) if value is None]
        if missing:
            raise UserError(
                f"{table.place(missing[0])}: expected a label in {column!r}, found none, and so in {len(missing)} of "
                f"{len(table)} rows; remove rows without a label"
            )
    first = "train" if "train" in tables else next(iter(tables))
    table, counts = tables[first], Counter(str(v) for v in values[first])
    named = next((t.classes[column] for t in tables.values() if column in t.classes), None)
    order = [*counts] if named is None else [*dict.fromkeys(named)]
    if named is not None and len(order) != len(named):
        raise UserError(f"{table.where}: expected classes of different names in {column!r}, found one twice")
    if whole:
        order = [*dict.fromkeys([*order, *(str(v) for vs in values.values() for v in vs)])]
    for name in order:
        check_text(name, f"{table.where}, {column!r}")
    if named is None:
        numbers = all(_NUMBER.fullmatch(name) for name in order)
        order = sorted(order, key=lambda name: (float(name), name)) if numbers else sorted(order)
        if numbers and any("." in n or "e" in n for n in order) and len(order) > _MOST_SCALE and not whole:
            raise UserError(
                f"{table.where}: expected classes in {column!r}, found {len(order)} different numbers, which look like "
                "measurements; make classes of them, or name another column by task.columns.label"
            )
    if whole:
        return tuple(order)
    if len(counts) < 2:
        raise UserError(f"{table.where}: expected at least two classes in {column!r}, found only {order[0]!r}")
    if len(counts) > max(len(table) / 2, 2):
        raise UserError(
            f"{table.where}: expected classes with several rows each in {column!r}, found {len(counts)} different "
            f"values in {len(table)} rows; name the column of labels by task.columns.label"
        )
    for split, other in tables.items():
        for number, value in enumerate(values[split]):
            if value not in counts and named is None:
                raise UserError(
                    f"{other.place(number)}: expected classes that {table.where} has ({', '.join(order[:20])}), found "
                    f"{value!r}, of which nothing can be learnt; remove it, or add such rows"
                )
    return tuple(order)


def _rows(
    table: Table, columns: Columns, values: Sequence[str | None] | None, classes: Sequence[str], split: str
) -> list[Row]:
    """The rows of a table; labels count `classes`."""
    texts = table.column(columns.text or "", "text")
    seconds = None if columns.text2 is None else table.column(columns.text2, "text2")
    ids = None if columns.id is None else table.column(columns.id, "id")
    place = {name: number for number, name in enumerate(classes)}
    rows, seen = [], dict[str, int]()
    for number, text in enumerate(texts):
        for column, value in ((columns.text, text), *(((columns.text2, seconds[number]),) if seconds else ())):
            if not isinstance(value, str) or not value.strip():
                raise UserError(
                    f"{table.place(number)}: expected {column!r} as text that is not blank, found "
                    f"{one_line(repr(value), 80)}; remove the row, or write text"
                )
        identity = str(number + 1) if ids is None else _identity(ids[number], table, number, columns.id)
        if seen.setdefault(identity, number) != number:
            raise UserError(
                f"{table.place(number)}: id {identity!r} was used in {table.place(seen[identity])} already; give every "
                "row its own id"
            )
        label = None if values is None else place[str(values[number])]
        rows.append(Row(identity, label, text=text, text2=None if seconds is None else seconds[number]))
    check_rows(rows)
    return rows


def _identity(value: Any, table: Table, number: int, column: str | None) -> str:
    name = str(value).strip() if isinstance(value, str) or is_number(value) else ""
    if not name:
        raise UserError(f"{table.place(number)}: expected an id in {column!r}, found {one_line(repr(value), 80)}")
    return name


def _divided(
    rows: dict[str, list[Row]],
    table: Table,
    columns: Columns,
    shares: tuple[float, float],
    seed: int,
    classes: Sequence[str],
) -> tuple[dict[str, list[Row]], list[str]]:
    """Rows with validation and test drawn from train where they are missing, and a sentence about it."""
    missing = {n: share for n, share in zip(("validation", "test"), shares, strict=True) if n not in rows}
    if not missing:
        return rows, []
    if sum(shares) >= 1:
        raise UserError(f"expected validation_fraction and test_fraction that leave rows for train, found {shares}")
    all_rows = rows["train"]
    keys = [bare(row)[0] for row in all_rows]
    groups = [] if columns.group is None else [_group(v) for v in table.column(columns.group, "group")]
    found = divide(keys, [row.label for row in all_rows], groups, missing, seed)
    for name in missing:
        if not found[name]:
            raise UserError(
                f"{table.where}: expected rows for train, {' and '.join(missing)}, found too few different "
                f"{'groups' if groups else 'texts'} in {len(all_rows)} rows; give more, or files of your own for them"
            )
    divided = {name: [all_rows[i] for i in found[name]] for name in found}
    by = "text" if columns.group is None else f"text and of {columns.group!r}"
    sizes = ", ".join(f"{len(divided[n])} {n}" for n in ("train", "validation", "test") if n in divided)
    notes = [f"{sizes} rows by the hash of their {by}, by class, seed {seed}"]
    for name in divided:
        there = {row.label for row in divided[name]}
        absent = [label for number, label in enumerate(classes) if number not in there]
        if absent:
            shown = ", ".join(one_line(label, 60) for label in absent[:5]) + ("..." if len(absent) > 5 else "")
            notes.append(f"{name} has no rows of {shown}")
    return rows | divided, notes


def _group(value: Any) -> str | None:
    return None if value is None else str(value)
