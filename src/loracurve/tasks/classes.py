"""Classes by name: what a task is without its rows, and rows of any data in the class order of a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

from loracurve.system.errors import UserError, nearest
from loracurve.tasks.config import Scoring, TaskConfig
from loracurve.tasks.dataset import KINDS, Dataset, Kind, Row
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import Task
from loracurve.tasks.templates import Template, custom_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RecordedTask", "TaskIdentity", "in_terms_of", "rows_hash", "rows_in_class_order"]


@dataclass(frozen=True)
class TaskIdentity:
    """What is the same whatever rows a task is given.

    `labels` are the class names in the order of the answers, `classes` what a prediction is over: these, or the letters
    of the options. `answer_ids`: token ids of the answers where all rows share them, else None. `window`: longest input
    in tokens.
    """

    kind: Kind
    scoring: Scoring
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    template: Template | None
    normalise: str
    append_eos: bool
    window: int | None
    answer_ids: tuple[int, ...] | None = None

    @classmethod
    def of(cls, task: Task, answer_ids: tuple[int, ...] | None = None) -> TaskIdentity:
        """Of a task as it is. `answer_ids`: as its encoded rows have them."""
        config, dataset = task.config, task.dataset
        options = config.normalise, config.append_eos, task.window, answer_ids
        return cls(dataset.kind, config.scoring, dataset.labels, task.classes, task.template, *options)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> TaskIdentity:
        """From what `record` gave and JSON kept. Raises KeyError, TypeError, ValueError or UserError for else."""
        lists = {n: None if values[n] is None else tuple(values[n]) for n in ("labels", "classes", "answer_ids")}
        template = values["template"]
        if template is not None:
            fixed = template["fixed_answers"]
            template = Template(**{**template, "fixed_answers": None if fixed is None else tuple(fixed)})
        found = cls(**{**values, **lists, "template": template})
        found.check()
        return found

    def check(self) -> None:
        """Raise ValueError or UserError where no task is like this."""
        template, lm = self.template, self.scoring == "lm"
        fixed = () if template is None else template.fixed_answers or ()
        sound = (
            self.kind in KINDS and self.scoring in get_args(Scoring) and lm == (self.kind == "language_modelling"),
            all(isinstance(name, str) for name in (*self.labels, *self.classes, *fixed)),
            not self.shares_classes or self.classes == self.labels,
            lm or len(self.classes) > 1,
            self.normalise in ("sum", "mean") and isinstance(self.append_eos, bool),
            self.window is None or (type(self.window) is int and self.window > 0),
            all(type(token) is int for token in self.answer_ids or ()),
            lm if template is None else (template.kind, template.form) == (self.kind, self.scoring),
        )
        if not all(sound):
            raise ValueError("a task that no run has")
        if template is not None:
            custom_template(template.kind, template.form, template.prompt, None)  # says what is wrong with a prompt

    def record(self) -> dict[str, Any]:
        """JSON-able; `read` reads it back."""
        return asdict(self)

    @property
    def shares_classes(self) -> bool:
        """Whether all rows have the classes, and not each its own choices."""
        return self.scoring != "lm" and not (self.kind == "multiple_choice" and self.scoring in ("letter", "text"))


class RecordedTask(Task):
    """A task as it was written down: kind, classes, prompt and answers are the record's, whatever data are given.

    Args:
        identity: the record.
        config: the run's options of the task; where they say something else, the record counts.
        tokenizer: the base model's.
        window: longest input of the model as it is now; the shorter of the two windows counts.
        name: of the data.
        open_data: reads the data. It is called when rows are first asked for; they are put into the classes' order.
    """

    def __init__(
        self,
        identity: TaskIdentity,
        config: TaskConfig,
        tokenizer: PreTrainedTokenizerBase,
        window: int | None,
        name: str,
        open_data: Callable[[], Dataset],
    ) -> None:
        self.identity = identity
        windows = [w for w in (identity.window, window) if w is not None]
        dataset = Dataset(
            name, identity.kind, identity.labels, _LateSplits(lambda: in_terms_of(open_data(), identity).splits)
        )
        recorded: dict[str, Any] = {
            "scoring": identity.scoring,
            "normalise": identity.normalise,
            "append_eos": identity.append_eos,
        }
        super().__init__(
            replace(config, **recorded),
            dataset,
            tokenizer,
            identity.template,
            min(windows, default=None),
            classes=identity.classes,
        )

    def encode_rows(self, rows: Sequence[Row], name: str = "rows", labelled: bool = True) -> Encoded:
        """As `Task.encode_rows`. Raises UserError also where the answers are other tokens than those recorded."""
        encoded = super().encode_rows(rows, name, labelled)
        known, found = self.identity.answer_ids, encoded.answer_ids
        if known and found and any(a != b for a, b in zip(known, found, strict=False)):
            raise UserError(
                f"{name}: expected the answers {list(encoded.classes)} as the tokens {list(known)} that were trained, "
                f"found {list(found)}; open the run with the version of loracurve that made it"
            )
        return encoded


class _LateSplits(Mapping[str, list[Row]]):
    """Splits that are read when they are first looked at."""

    def __init__(self, read: Callable[[], Mapping[str, list[Row]]]) -> None:
        self._read = read

    @cached_property
    def _splits(self) -> Mapping[str, list[Row]]:
        return self._read()

    def __getitem__(self, split: str) -> list[Row]:
        return self._splits[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


def in_terms_of(dataset: Dataset, identity: TaskIdentity) -> Dataset:
    """A data set for a task's prompt, with its rows' labels in the order of the task's classes, by their names.

    Raises:
        UserError: data of another kind, without the second text that the prompt has, or with a class that the task has
            not.
    """
    if dataset.kind != identity.kind:
        raise UserError(f"{dataset.name}: expected {identity.kind} data, as the run's own, found {dataset.kind}")
    for field in ("text2", "context"):
        in_prompt = identity.template is not None and field in identity.template.fields
        if in_prompt and not any(getattr(row, field) for rows in dataset.splits.values() for row in rows):
            raise UserError(f"{dataset.name}: expected rows with {field!r}, which the run's prompt has, found none")
    if not identity.shares_classes:
        return dataset
    splits = {
        split: rows_in_class_order(rows, dataset.labels, identity, f"{dataset.name}, {split}")
        for split, rows in dataset.splits.items()
    }
    return replace(dataset, labels=identity.labels, splits=splits)


def rows_in_class_order(
    rows: Sequence[Row], labels: Sequence[str], identity: TaskIdentity, where: str = "rows"
) -> list[Row]:
    """Rows with labels and shared choices in the order of a task's classes, by name; others stay as they are.

    Args:
        rows: of the task's kind.
        labels: names that the labels of classification rows count; multiple choice has its own in each row.
        identity: the task.
        where: begins the message of every UserError.

    Raises:
        UserError: a class that the task does not have.
    """
    if not identity.shares_classes:
        return list(rows)
    known = identity.labels
    if identity.kind == "classification":
        places = [_place(name, known, where) for name in labels]
        return [row if row.label is None else replace(row, label=places[row.label]) for row in rows]
    found = []
    for row in rows:
        places = [_place(choice, known, f"{where}, row {row.id!r}") for choice in row.choices]
        found.append(replace(row, choices=known, label=None if row.label is None else places[row.label]))
    return found


def _place(name: str, known: Sequence[str], where: str) -> int:
    if name not in known:
        raise UserError(
            f"{where}: expected classes that the run was trained on ({', '.join(known)}), found {name!r}"
            f"{nearest(name, known)}"
        )
    return known.index(name)


def rows_hash(dataset: Dataset, split: str) -> str:
    """SHA-256 of the ids, texts, choices and labels (of classification by name) of a split."""
    digest = hashlib.sha256()
    for row in dataset.rows(split):
        label: Any = row.label
        if dataset.kind == "classification" and row.label is not None:
            label = dataset.labels[row.label]
        parts = (row.id, row.text, row.text2, row.question, row.choices, row.context, row.prompt, row.completion, label)
        digest.update(json.dumps(parts).encode() + b"\n")
    return digest.hexdigest()
