"""A task: a data set, a prompt, and how an answer is scored, tokenised for one tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loracurve.system.errors import UserError, nearest
from loracurve.system.paths import exists, is_folder
from loracurve.tasks.cloze import has_gap
from loracurve.tasks.config import Columns, TaskConfig
from loracurve.tasks.dataset import Dataset, Row, read_dataset, split_validation, subset
from loracurve.tasks.encoding import Encoded, Encoder
from loracurve.tasks.hub_datasets import HUB, load_from_hub
from loracurve.tasks.ood import adopted, check_foreign, without_classes
from loracurve.tasks.own_data import dataset_from_tables, holds_tables
from loracurve.tasks.tables import ENDINGS, in_memory
from loracurve.tasks.templates import TEMPLATES, Template, custom_template, default_template
from loracurve.tasks.word_sentiment import word_sentiment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Task", "load_task", "open_dataset", "settled_dataset", "sized_dataset"]


logger = logging.getLogger("loracurve")

_MAIN_SPLITS = ("train", "validation", "test")


class Task:
    """A data set with its prompt, for one tokenizer. Made by `load_task`.

    Attributes: `config`, `dataset` (after limits and validation split), `tokenizer`, `template` (None for language
    modelling), `window` (longest input in tokens, or None), `validation` (how the validation split came about).
    """

    def __init__(
        self,
        config: TaskConfig,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | None,
        window: int | None,
        validation: str = "the data set's own",
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.template = template
        self.window = window
        self.validation = validation
        self._encoder = Encoder(
            tokenizer, dataset, config.scoring, template, window, config.normalise, config.append_eos, classes
        )
        self._given_classes = classes
        self._encoded: dict[str, Encoded] = {}
        self._truncated: dict[str, int] = {}

    def in_window(self, model_window: int | None) -> Task:
        """The same task for a model of this window, nothing encoded yet; the data are not read again.

        Raises UserError for a `max_length` above it.
        """
        window = _window(self.config, model_window)
        return Task(
            self.config,
            self.dataset,
            self.tokenizer,
            self.template,
            window,
            self.validation,
            self._given_classes,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, or the letters of the options; empty for language modelling."""
        return self._encoder.classes

    def encode(self, split: str) -> Encoded:
        """One split (train, validation, test, ...), tokenised: an example for each row, in their order. It is tokenised
        once and kept. Raises UserError as `encode_rows`, or where there is no such split."""
        if split not in self._encoded:
            self._encoded[split] = self.encode_rows(self.dataset.rows(split), split)
        return self._encoded[split]

    def encode_rows(self, rows: Sequence[Row], name: str = "rows", labelled: bool = True) -> Encoded:
        """Tokenise rows of this or any other data set by this task's prompt.

        `labelled` False: the rows' labels mean something else here (out of distribution) and are left out, as they
        are for rows of another kind. `name` is used in messages and in `describe`.

        Raises UserError for labels out of range, choices that don't fit, and answers that aren't single tokens.
        """
        encoded = self._encoder.encode(rows, labelled)
        self._truncated[name] = encoded.truncated
        if encoded.truncated:
            cuts = (
                (encoded.cut_prompts, "prompts were cut on the left"),
                (encoded.cut_completions, "completions lost tokens at their right end"),
            )
            said = " and ".join(f"{count} of {len(encoded)} {what}" for count, what in cuts if count)
            logger.warning("%s, %s: %s to fit %d tokens", self.dataset.name, name, said, self.window)
        return encoded

    def encode_foreign(self, rows: Sequence[Row], name: str = "rows") -> Encoded:
        """Tokenise rows of other data, of any kind, out of distribution: without labels, in this task's form
        (`ood.adopted`). Raises UserError where too many are rows of this data set (`ood.check_foreign`)."""
        check_foreign(rows, self.dataset, name)
        return self.encode_rows(adopted(rows, self.dataset), name, labelled=False)

    def labels(self, split: str) -> torch.Tensor:
        """Labels of a split, LongTensor [rows]. Raises UserError where a row has none."""
        rows = self.dataset.rows(split)
        missing = next((row.id for row in rows if row.label is None), None)
        if missing is not None:
            raise UserError(f"{self.dataset.name}, {split}: expected a label on every row, found none on {missing!r}")
        return torch.tensor([row.label for row in rows], dtype=torch.long)

    def describe(self) -> dict[str, Any]:
        """What a run directory records; JSON-able. `truncated` has the splits encoded so far."""
        template = self.template
        return {
            "name": self.dataset.name,
            "kind": self.dataset.kind,
            "scoring": self.config.scoring,
            "classes": list(self.classes),
            "sizes": {split: len(rows) for split, rows in self.dataset.splits.items()},
            "template": None
            if template is None
            else {
                "name": template.name,
                "version": template.version,
                "hash": template.hash,
                "prompt": template.prompt,
                "answer": template.answer,
            },
            "normalise": self.config.normalise,
            "window": self.window,
            "truncated": dict(self._truncated),
            "validation": self.validation,
            "notes": self.dataset.notes,
            "source": self.dataset.source,
            "columns": dict(self.dataset.columns),
        }


def open_dataset(
    data: Any,
    seed: int = 0,
    columns: Columns | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    whole: bool = False,
) -> Dataset:
    """A data set by the path of a folder or a file, by hub name or ``word_sentiment`` (in this order), or of a frame or
    a data set in memory (`own_data.dataset_from_tables`, which has the other arguments).

    Raises:
        UserError: it is none of these, or as the readers.
    """
    options: dict[str, Any] = {
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "seed": seed,
        "whole": whole,
    }
    if isinstance(data, Dataset):
        return data
    if not isinstance(data, str | Path):
        if in_memory(data):
            return dataset_from_tables(data, columns, **options)
        raise UserError(
            "data: expected a path or a name, a pandas.DataFrame, a datasets.Dataset or a DatasetDict, found "
            f"{type(data).__name__}"
        )
    data = str(data)
    if is_folder(data):
        return dataset_from_tables(data, columns, **options) if holds_tables(data) else read_dataset(data)
    if data.lower().endswith(ENDINGS) or (exists(data) and data != "word_sentiment" and data not in HUB):
        return dataset_from_tables(data, columns, **options)
    if data == "word_sentiment":
        return word_sentiment(seed=seed)
    if data in HUB:
        return load_from_hub(data)
    close = nearest(data, [*HUB, "word_sentiment"])
    raise UserError(f"data: expected a file, a folder, a hub data set or word_sentiment, found {data!r}{close}")


def load_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_window: int | None = None) -> Task:
    """Open the data, settle validation rows and limits, and choose the prompt. Downloads only for hub names.

    Args:
        config: which data, and how answers are scored.
        tokenizer: the base model's.
        model_window: longest input of the model in tokens; None: unknown. Longer prompts are cut on the left, longer
            completions at their right end.

    Raises:
        UserError: no such data, rows that break the rules of docs/how-to/data.md, a prompt or a scoring that does not
            suit them, a `max_length` above the model's window.
    """
    window = _window(config, model_window)
    dataset, validation = settled_dataset(config)
    if dataset.columns:
        logger.warning("%s: %s", dataset.name, dataset.notes)
    template = _template(config, dataset)
    return Task(config, dataset, tokenizer, template, window, validation)


def _window(config: TaskConfig, model_window: int | None) -> int | None:
    """The longest input of a task in tokens."""
    if config.max_length is not None and model_window is not None and config.max_length > model_window:
        raise UserError(f"max_length: expected at most the model's window of {model_window}, found {config.max_length}")
    return config.max_length or model_window


def settled_dataset(config: TaskConfig, whole: bool = False) -> tuple[Dataset, str]:
    """The data of a task with validation rows and within its limits, and how the validation split came about.

    Args:
        config: of the task.
        whole: the data are judged only, so that one table is all of the split test.

    Raises:
        UserError: no such data, rows that break the rules of docs/how-to/data.md or own-data.md.
    """
    dataset = without_classes(sized_dataset(config, whole), config.held_out)
    splits, validation = dict(dataset.splits), dataset.notes if dataset.columns else "the data set's own"
    if "validation" not in splits and "train" in splits:
        splits["train"], splits["validation"] = split_validation(
            dataset.rows("train"), config.validation_fraction, config.seed
        )
        size, part = len(splits["validation"]), config.validation_fraction
        validation = f"{size} rows ({part:g}) of train by hash of id, seed {config.seed}"
    for split in _MAIN_SPLITS:
        limit = getattr(config, f"limit_{split}")
        if limit is not None and split in splits:
            splits[split] = subset(splits[split], limit, config.seed)
    splits = {split: splits[split] for split in _MAIN_SPLITS if split in splits} | splits
    return replace(dataset, splits=splits), validation


def sized_dataset(config: TaskConfig, whole: bool = False) -> Dataset:
    """The data of a task before limits, and `whole` as in `settled_dataset`."""
    named = isinstance(config.data, str) and config.data == "word_sentiment"
    if not named or is_folder(config.data):
        parts = config.validation_fraction, config.test_fraction
        return open_dataset(config.data, config.seed, config.columns, *parts, whole)
    # Made to measure: there are more words than the default sizes use.
    asked = {split: getattr(config, f"limit_{split}") for split in _MAIN_SPLITS}
    return word_sentiment(**{split: size for split, size in asked.items() if size is not None}, seed=config.seed)


def _template(config: TaskConfig, dataset: Dataset) -> Template | None:
    scoring = config.scoring
    if (scoring == "lm") != (dataset.kind == "language_modelling"):
        raise UserError(f"scoring: expected one that suits {dataset.kind} data, found {scoring!r}")
    if scoring == "lm":
        if config.template is not None or config.prompt is not None:
            raise UserError("template, prompt: expected none with scoring lm; write the prompt into the rows")
        return None
    rows = [row for split in _MAIN_SPLITS for row in dataset.splits.get(split, [])]
    second = "context" if dataset.kind == "multiple_choice" else "text2"
    has_second = any(getattr(row, second) for row in rows)
    if config.prompt is not None:
        template = custom_template(dataset.kind, scoring, config.prompt, config.answers)
    elif config.template is not None:
        if config.template not in TEMPLATES:
            close = nearest(config.template, TEMPLATES)
            raise UserError(f"template: expected one of {', '.join(TEMPLATES)}, found {config.template!r}{close}")
        template = TEMPLATES[config.template]
    elif dataset.name == "word_sentiment" and scoring == "label" and dataset.labels == ("negative", "positive"):
        template = TEMPLATES["word_sentiment"]
    elif scoring == "text" and all(has_gap(row.question) for row in rows):
        template = TEMPLATES["choice_gap"]
    else:
        template = default_template(dataset.kind, scoring, has_second)
    if (template.kind, template.form) != (dataset.kind, scoring):
        raise UserError(
            f"template {template.name}: it is for {template.kind} scored by {template.form}, "
            f"found {dataset.kind} scored by {scoring}"
        )
    if second in template.fields and not has_second:
        raise UserError(f"prompt: expected rows with {second!r} for the field {{{second}}}, {dataset.name} has none")
    return template
