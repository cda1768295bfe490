"""Options of a task. No torch here: options are read before it is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from loracurve.system.errors import UserError, nearest
from loracurve.system.ranges import Count, OpenShare, Seed, check_ranges
from loracurve.tasks.dataset import check_text

__all__ = ["Columns", "Scoring", "TaskConfig"]


Scoring = Literal["letter", "label", "text", "head", "lm"]


@dataclass(frozen=True)
class Columns:
    """Which column of a table is what; those that are left out are guessed."""

    text: str | None = None
    """Column of the texts."""
    text2: str | None = None
    """Column of second texts, for pairs."""
    label: str | None = None
    """Column of the classes, text or numbers."""
    group: str | None = None
    """Rows of one group (a person, a document) go to the same split. Never guessed."""
    id: str | None = None
    """Column of ids. Default: id where its values differ, else row numbers from 1."""


@dataclass(frozen=True)
class TaskConfig:
    """What to learn and how its answers are scored."""

    data: str
    """A CSV, Parquet or JSON lines file, a folder with train and perhaps validation and test in such files (or
    train/validation/test.jsonl with meta.json), the name of a hub data set, or word_sentiment. In Python also a
    pandas.DataFrame, a datasets.Dataset or DatasetDict, for `load_task`."""
    scoring: Scoring
    """letter: options are listed and their letters scored; label: the class's word, one token; text: log-likelihood of
    each choice's text; head: a sequence classification head; lm: language modelling."""
    template: str | None = None
    """Name of a built-in prompt template. Default: the one for this kind of data and scoring."""
    prompt: str | None = None
    """A prompt of your own with fields such as {text}, {text2}, {question}, {context}, {options}."""
    answers: list[str] | None = None
    """What continues your own prompt, one for each class, in label order. A leading space is put in where needed."""
    normalise: Literal["sum", "mean"] = "sum"
    """Score of a choice's text: sum or mean of the log-likelihoods of its tokens."""
    max_length: Count | None = None
    """Longest input in tokens, the choice or completion included. Default: the model's window."""
    limit_train: Count | None = None
    """Use this many training rows, drawn by the hash of their ids."""
    limit_validation: Count | None = None
    """Use this many validation rows."""
    limit_test: Count | None = None
    """Use this many test rows."""
    validation_fraction: OpenShare = 0.1
    """Part of train (of a single table: of all its rows) that becomes validation where there is no such split."""
    test_fraction: OpenShare = 0.1
    """Part of a table that becomes test where there is no such file."""
    columns: Columns = field(default_factory=Columns)
    """Which column of a table is what. Default: a guess by names and content, which a line in the log says."""
    held_out: list[str] = field(default_factory=list)
    """Classes (of a classification) that are left out of all splits; their test rows become the split `held_out`, near
    to the data and foreign to the model."""
    append_eos: bool = False
    """Language modelling: the end-of-sequence token belongs to the completion."""
    seed: Seed = 0
    """Seed of the validation split, of the limits and of word_sentiment's splits."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, valid in (("scoring", get_args(Scoring)), ("normalise", ("sum", "mean"))):
            value = getattr(self, name)
            if value not in valid:
                raise UserError(
                    f"{name}: expected one of {', '.join(valid)}, found {value!r}{nearest(str(value), valid)}"
                )
        taken = [name for name in (self.columns.text, self.columns.text2, self.columns.label) if name is not None]
        if len(set(taken)) < len(taken):
            raise UserError(f"columns: expected different columns for text, text2 and label, found {taken}")
        if isinstance(self.answers, str):
            raise UserError(f"answers: expected a list with one text for each class, found {self.answers!r}")
        for name, text in (("prompt", self.prompt), *(("answers", answer) for answer in self.answers or ())):
            if text is not None:
                check_text(text, name)
        if self.template is not None and self.prompt is not None:
            raise UserError("expected template or prompt, found both; leave one out")
        if self.answers is not None and self.prompt is None:
            raise UserError("answers: expected a prompt with them, found none; give prompt too")
