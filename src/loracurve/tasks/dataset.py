"""Rows of a data set and how they are read from a folder: train/validation/test.jsonl and meta.json.

Row schemas, one JSON object on each line:

* classification: ``{id, text, [text2], label}``
* multiple choice: ``{id, question, choices, label, [context]}``
* language modelling: ``{id, text}`` or ``{id, prompt, completion}``

meta.json holds ``task`` (one of the three kinds) and, for classification, ``labels``; ``notes``, ``source``,
``license`` and ``sizes`` are optional.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

from loracurve.system.errors import UserError, nearest
from loracurve.system.files import once
from loracurve.system.paths import exists, file_size, is_file, is_folder, opened, read_text

__all__ = [
    "MOST_CHARACTERS",
    "Dataset",
    "Kind",
    "Row",
    "as_text",
    "by_hash",
    "check_rows",
    "check_text",
    "parse_row",
    "read_dataset",
    "read_rows",
    "split_validation",
    "subset",
]


Kind = Literal["classification", "multiple_choice", "language_modelling"]

KINDS: tuple[str, ...] = get_args(Kind)

MAX_CHOICES = 26

MOST_CHARACTERS = 2**24  # of a line


@dataclass(frozen=True)
class Row:
    """One item. Fields its kind doesn't have are None (`choices`: empty).

    `label` is the index into the data set's labels (classification) or into `choices`; None where there is none.
    `spread` is the standard deviation of the annotators' ratings, where a data set records it.
    """

    id: str
    label: int | None = None
    text: str | None = None
    text2: str | None = None
    question: str | None = None
    choices: tuple[str, ...] = ()
    context: str | None = None
    prompt: str | None = None
    completion: str | None = None
    spread: float | None = None


class _WithId(Protocol):
    @property
    def id(self) -> str: ...


HasId = TypeVar("HasId", bound=_WithId)
"""rows, or what they are tokenised to"""


@dataclass(frozen=True)
class Dataset:
    """Named splits of rows of one kind.

    `labels` are the class names; for multiple choice they may name the options, or be empty. `splits` has at least
    ``train`` and ``test`` when read from a folder or the hub, and possibly further ones (out-of-distribution rows).
    `notes` says how the splits differ from the published ones, `source` where the rows come from. `columns` says which
    column of a table is what, for rows that were read from one.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    splits: Mapping[str, list[Row]]
    notes: str = ""
    source: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)

    def rows(self, split: str) -> list[Row]:
        """The rows of `split`. Raises UserError naming the splits there are."""
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise UserError(
                f"data set {self.name!r} has no split {split!r} (it has {known}){nearest(split, self.splits)}"
            )
        return self.splits[split]


def as_text(row: Row) -> str:
    """The plain text of a row of any kind, without its choices, for rows that are put into another task's prompt."""
    if row.question is not None:
        return f"{row.context} {row.question}" if row.context else row.question
    if row.text is not None:
        return f"{row.text} {row.text2}" if row.text2 else row.text
    return f"{row.prompt or ''}{row.completion or ''}"


def check_text(value: object, where: str) -> None:
    """Raise UserError where `value` is no text that can be tokenised and written: half of a surrogate pair is none."""
    if not isinstance(value, str):
        raise UserError(f"{where}: expected text, found {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise UserError(f"{where}: expected text, found half of a surrogate pair ({half}); write it as UTF-8") from None


def check_rows(rows: Sequence[Row]) -> None:
    """`check_text` of all that is written in rows, for those that were not read from a file (`parse_row`)."""
    for row in rows:
        for name in ("id", "text", "text2", "question", "context", "prompt", "completion"):
            if getattr(row, name) is not None:
                check_text(getattr(row, name), f"row {row.id!r}, {name!r}")
        for number, choice in enumerate(row.choices, start=1):
            check_text(choice, f"row {row.id!r}, 'choices', {number}")


def read_dataset(folder: str | Path) -> Dataset:
    """Read a local data set. A missing validation.jsonl, or an empty one that meta.json's sizes declare as 0, leaves
    the data set without that split.

    Raises UserError for a missing file, an empty split, or a row that breaks the schema (with its line number).
    """
    folder = Path(folder)
    if not is_folder(folder):
        raise UserError(
            f"expected a data folder with meta.json and train/validation/test.jsonl, found no folder {folder}"
        )
    meta = _read_meta(folder / "meta.json")
    kind, labels = _kind_and_labels(meta, folder / "meta.json")
    splits: dict[str, list[Row]] = {}
    for split in ("train", "validation", "test"):
        path = folder / f"{split}.jsonl"
        if split == "validation" and not exists(path):
            continue
        declared = meta.get("sizes")
        declared_empty = isinstance(declared, dict) and declared.get(split) == 0
        if split == "validation" and declared_empty and exists(path) and file_size(path) == 0:
            continue
        splits[split] = read_rows(path, kind, labels)
    source = "; ".join(part for part in (_source_text(meta.get("source")), _license_text(meta)) if part)
    return Dataset(folder.resolve().name, kind, labels, splits, str(meta.get("notes", "")), source)


def read_rows(path: str | Path, kind: Kind, labels: Sequence[str] = (), require_labels: bool = True) -> list[Row]:
    """Read one JSONL file of rows of `kind`.

    `labels`: class names (classification) or option names (multiple choice; empty: any number of options). With
    `require_labels` False a label may be absent or null, and a completion absent, as in input to predict and generate.

    Raises UserError naming file and line for broken JSON, missing or mistyped fields, labels out of range and
    duplicate ids; and for a missing file or one without rows.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"expected a file of {kind} rows, found no file {path}")
    rows: list[Row] = []
    line_of: dict[str, int] = {}
    try:
        with opened(path, mode="r", encoding="utf-8-sig") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MOST_CHARACTERS + 1), ""), start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                if len(line) > MOST_CHARACTERS:
                    raise UserError(f"{where}: expected at most {MOST_CHARACTERS} characters, found more")
                try:
                    record = json.loads(line, object_pairs_hook=once)
                except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
                    reason = getattr(error, "msg", str(error))
                    raise UserError(f"{where}: expected one JSON object, found broken JSON ({reason})") from None
                row = parse_row(record, kind, labels, where, require_labels)
                if row.id in line_of:
                    first = line_of[row.id]
                    raise UserError(
                        f"{where}: id {row.id!r} was used on line {first} already; give every row its own id"
                    )
                line_of[row.id] = number
                rows.append(row)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected UTF-8 text, found byte {error.start} that is not; save it as UTF-8"
        ) from None
    if not rows:
        raise UserError(f"{path}: expected at least one row, found an empty file")
    return rows


def parse_row(record: object, kind: Kind, labels: Sequence[str], where: str, require_label: bool = True) -> Row:
    """One validated Row from a JSON object. `where` begins the message of every UserError ("file, line n")."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected a JSON object with the fields of a row, found {type(record).__name__}")
    identity = record.get("id")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == "":
        raise UserError(f"{where}: expected a string 'id', found {identity!r}; give every row its own id")
    identity = str(identity)
    check_text(identity, f"{where}, 'id'")
    if kind == "language_modelling":
        if record.get("text") is not None:
            both = [field for field in ("prompt", "completion") if record.get(field) is not None]
            if both:
                raise UserError(f"{where}: expected 'text', or 'prompt' and 'completion', found 'text' and {both[0]!r}")
            return Row(identity, text=_string(record, "text", where))
        wanted = require_label or record.get("completion") is not None
        completion = _string(record, "completion", where) if wanted else None
        return Row(identity, prompt=_string(record, "prompt", where), completion=completion)
    if kind == "classification":
        label = _label(record, len(labels), where, require_label)
        text2 = _string(record, "text2", where) if record.get("text2") is not None else None
        return Row(identity, label, text=_string(record, "text", where), text2=text2)
    choices = record.get("choices")
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not all(isinstance(c, str) for c in choices):
        raise UserError(f"{where}: expected 'choices' as a list of strings, found {choices!r}")
    most = len(labels) or MAX_CHOICES
    if not 2 <= len(choices) <= most:
        raise UserError(f"{where}: expected 2 to {most} choices, found {len(choices)}")
    for number, choice in enumerate(choices, start=1):
        check_text(choice, f"{where}, 'choices', {number}")
    label = _label(record, len(choices), where, require_label)
    context = _string(record, "context", where) if record.get("context") is not None else None
    return Row(identity, label, question=_string(record, "question", where), choices=tuple(choices), context=context)


def split_validation(rows: Sequence[Row], fraction: float = 0.1, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(train, validation): the rows whose hashed id comes first become validation; at least one row stays in each.

    Which rows they are depends on ids, `fraction` and `seed` only, never on the order of the rows.
    """
    if not 0.0 < fraction < 1.0:
        raise UserError(f"expected a validation fraction between 0 and 1, found {fraction}")
    if len(rows) < 2:
        raise UserError(f"expected at least 2 training rows to split off a validation set, found {len(rows)}")
    held_out = subset(rows, min(max(1, round(fraction * len(rows))), len(rows) - 1), seed)
    ids = {row.id for row in held_out}
    return [row for row in rows if row.id not in ids], held_out


def subset(rows: Sequence[HasId], size: int, seed: int = 0) -> list[HasId]:
    """`size` rows in their old order, drawn by the hash of their ids; smaller subsets lie inside larger ones."""
    chosen = {row.id for row in by_hash(rows, seed)[:size]}
    return [row for row in rows if row.id in chosen]


def by_hash(rows: Sequence[HasId], seed: int = 0) -> list[HasId]:
    """The rows in the order in which `subset` draws them."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row.id}".encode()).digest())


def _string(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if field not in record:
        raise UserError(
            f"{where}: expected a field {field!r}, found {sorted(record)}{nearest(field, map(str, record))}"
        )
    if not isinstance(value, str) or not value.strip():
        # An empty prompt is meant: a completion from nothing.
        if field == "prompt" and value == "":
            return ""
        raise UserError(f"{where}: expected {field!r} as text that is not blank, found {value!r}")
    check_text(value, f"{where}, {field!r}")
    return value


def _label(record: Mapping[str, Any], classes: int, where: str, required: bool) -> int | None:
    value = record.get("label")
    if value is None:
        if required:
            raise UserError(f"{where}: expected a 'label' from 0 to {classes - 1}, found none")
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: expected 'label' as a whole number from 0 to {classes - 1}, found {value!r}")
    if not 0 <= value < classes:
        raise UserError(f"{where}: expected a label from 0 to {classes - 1}, found {value}")
    return value


def _read_meta(path: Path) -> dict[str, Any]:
    example = '{"task": "classification", "labels": ["negative", "positive"]}'
    if not is_file(path):
        raise UserError(f"expected {path}, found none; write one such as {example}")
    text = read_text(path)
    try:
        meta = json.loads(text, object_pairs_hook=once)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON object such as {example}, found broken JSON ({error})") from None
    if not isinstance(meta, dict):
        raise UserError(f"{path}: expected a JSON object such as {example}, found {type(meta).__name__}")
    for name, value in meta.items():
        check_text(json.dumps(value, ensure_ascii=False), f"{path}, {name!r}")
    return meta


def _kind_and_labels(meta: Mapping[str, Any], path: Path) -> tuple[Kind, tuple[str, ...]]:
    kind = meta.get("task")
    if kind not in KINDS:
        raise UserError(
            f"{path}: expected 'task' to be one of {', '.join(KINDS)}, found {kind!r}{nearest(str(kind), KINDS)}"
        )
    labels = meta.get("labels") or []
    if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise UserError(f"{path}: expected 'labels' as a list of names, found {labels!r}")
    if len(set(labels)) != len(labels) or (kind == "classification" and len(labels) < 2):
        raise UserError(f"{path}: expected at least two different 'labels', found {labels!r}")
    return kind, tuple(labels)


def _source_text(source: object) -> str:
    if isinstance(source, str):
        return source
    if isinstance(source, list):
        return "; ".join(
            f"{s['repository']}@{s.get('commit', '?')}" if isinstance(s, dict) and "repository" in s else str(s)
            for s in source
        )
    return ""


def _license_text(meta: Mapping[str, Any]) -> str:
    return f"licence: {meta['license']}" if meta.get("license") else ""
