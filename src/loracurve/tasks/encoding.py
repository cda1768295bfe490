"""Rows to token ids: the examples that models are trained on and evaluated with."""

from __future__ import annotations

import bisect
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from loracurve.system.errors import UserError
from loracurve.tasks.cloze import fillings, given_lengths
from loracurve.tasks.dataset import Dataset, Row, as_text, check_rows, check_text
from loracurve.tasks.templates import LETTERS, MAIN_FIELD, Template, check_letters, fields_of, label_word
from loracurve.tasks.tokens import (
    answer_tokens,
    choice_tokens,
    common_prefix,
    fit_fields,
    leading_tokens,
    split_lead,
    tokenise,
    with_lead,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["UNLABELLED", "Encoded", "Encoder", "Example", "labels_of"]


Fields = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One row as token ids.

    `prompt` begins with the special tokens that the tokenizer puts in front; they stand once where the text writes them
    too. `choices` are the continuations: one for each choice ("text"), the completion alone ("lm"), none otherwise.
    `n_choices` is how many of the classes this row has: of the shared answer ids only the first `n_choices` count.
    `token_types` belong to `prompt` (encoders). `given`: how many tokens at the start of each choice are read but not
    scored; empty: none.
    """

    id: str
    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    label: int | None
    n_choices: int
    token_types: tuple[int, ...] | None = None
    given: tuple[int, ...] = ()


UNLABELLED = -100
"""Label of an example that has none; it is left out of every mean."""


def labels_of(examples: Sequence[Example]) -> Tensor:
    """``[E]`` labels, `UNLABELLED` where there is none."""
    return torch.tensor([UNLABELLED if example.label is None else example.label for example in examples])


@dataclass(frozen=True)
class Encoded:
    """One split, tokenised: exactly one example for each row, in the rows' order.

    `answer_ids` ("answer" only): token id of each class or letter, shared by all examples and found as continuations
    of their own prompts. `normalise`: how a choice's text is scored, "sum" or "mean" over its tokens. `truncated`:
    how many examples were cut to the window: `cut_prompts` of them on the left of the prompt, and `cut_completions`
    ("lm") at the right end of the completion; one can be both. `pad_id`: the tokenizer's padding token.
    """

    examples: list[Example]
    scoring: Literal["answer", "text", "head", "lm"]
    answer_ids: tuple[int, ...] | None
    classes: tuple[str, ...]
    normalise: str
    truncated: int
    pad_id: int = 0
    cut_prompts: int = 0
    cut_completions: int = 0

    @cached_property
    def token_offsets(self) -> list[int]:
        """For "lm": number of each example's first completion token when all are counted, and the total at the end."""
        return [0, *accumulate(len(example.choices[0]) for example in self.examples)]

    @property
    def predictions(self) -> int:
        """How many predictions the split takes: one an example, of language modelling one a target token."""
        return self.token_offsets[-1] if self.scoring == "lm" else len(self.examples)

    def name_of(self, prediction: int) -> str:
        """What messages call a prediction, by its number among `predictions`: its row's id."""
        if self.scoring == "lm":
            prediction = bisect.bisect_right(self.token_offsets, prediction) - 1
        return f"row {self.examples[prediction].id!r}"

    @cached_property
    def labels(self) -> Tensor:
        """``[examples]`` class numbers, `UNLABELLED` where an example has none."""
        return labels_of(self.examples)

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of each example: its prompt and its choices but for their last tokens, which are only predicted."""
        return [len(e.prompt) + sum(len(choice) - 1 for choice in e.choices) for e in self.examples]

    @cached_property
    def shortest_path(self) -> int:
        """Tokens of the shortest prompt with one of its choices, but for the last."""
        return min((len(e.prompt) + min((len(c) - 1 for c in e.choices), default=0) for e in self.examples), default=0)

    @cached_property
    def largest_token_type(self) -> int:
        """The largest token type of all prompts; 0 where there are none."""
        return max((max(e.token_types) for e in self.examples if e.token_types), default=0)

    @cached_property
    def longest_path(self) -> int:
        """Tokens of the longest prompt with one of its choices, but for the last, which is only predicted."""
        return max((len(e.prompt) + max((len(c) - 1 for c in e.choices), default=0) for e in self.examples), default=0)

    @cached_property
    def sorted_sizes(self) -> list[int]:
        """`sizes`, ascending."""
        return sorted(self.sizes)

    @cached_property
    def total_size(self) -> int:
        """Sum of `sizes`."""
        return sum(self.sizes)

    @cached_property
    def prefix(self) -> int:
        """Tokens with which all prompts begin; packed rows hold them once."""
        return common_prefix([e.prompt for e in self.examples])

    @cached_property
    def most_choices(self) -> int:
        """The largest number of choices that an example has."""
        return max((len(example.choices) for example in self.examples), default=0)

    def __len__(self) -> int:
        return len(self.examples)


class Encoder:
    """Encodes rows of any data set by the prompt of one (see `Task.encode_rows`). `window` None: nothing is cut.
    `classes`: the data set's, where they are known; its rows are then left alone."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        scoring: Literal["letter", "label", "text", "head", "lm"],
        template: Template | None,
        window: int | None,
        normalise: str = "sum",
        append_eos: bool = False,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.tokenizer, self.scoring, self.template, self.window = tokenizer, scoring, template, window
        self.kind, self.labels, self.normalise = dataset.kind, dataset.labels, normalise
        for name, value in (("name", dataset.name), ("notes", dataset.notes), ("source", dataset.source)):
            check_text(value, f"data set, {name}")
        for label in dataset.labels:
            check_text(label, f"{dataset.name}, labels")
        self.lead = leading_tokens(tokenizer)
        self.eos: tuple[int, ...] = ()
        if append_eos:
            if tokenizer.eos_token_id is None:
                raise UserError("append_eos: expected a tokenizer with an end-of-sequence token, found none")
            self.eos = (int(tokenizer.eos_token_id),)
        # Multiple choice by letter or text: every row has its own choices, else all rows share the classes.
        self.own_choices = dataset.kind == "multiple_choice" and scoring in ("letter", "text")
        rows = [] if classes is not None else [row for part in dataset.splits.values() for row in part]
        fixed = template.fixed_answers if template is not None else None
        lists = template is not None and "options" in template.fields
        self.lettered = lists or (scoring == "letter" and fixed is None)
        if classes is not None:
            self.classes = classes
        elif self.own_choices:
            self.classes = self._letters(rows)
        else:
            self.classes = () if scoring == "lm" else dataset.labels
        if dataset.kind == "multiple_choice" and not self.own_choices:
            other = next((row for row in rows if row.choices != self.labels), None)
            if other is not None:
                raise UserError(
                    f"scoring {scoring}: expected the choices {list(self.labels)} in every row, found "
                    f"{list(other.choices)} in {other.id!r}; use scoring letter or text"
                )
        if fixed is not None and scoring == "head":
            raise UserError("answers: expected none with scoring head, which has no answer tokens; leave them out")
        if fixed is not None and self.own_choices and scoring == "text":
            raise UserError("answers: expected none where each row's own choices are scored; leave them out")
        if fixed is not None and len(fixed) != len(self.classes):
            raise UserError(f"answers: expected {len(self.classes)} for the classes {self.classes}, found {len(fixed)}")
        if self.lettered and not self.own_choices:
            check_letters(len(self.classes), f"scoring {scoring}")
        if not self.own_choices and (lists or (scoring in ("label", "text") and fixed is None)):
            _check_words(self.classes)

    def encode(self, rows: Sequence[Row], labelled: bool = True) -> Encoded:
        """One example for each row. See `Task.encode_rows`."""
        check_rows(rows)
        if self.scoring == "lm":
            return self._encode_lm(rows)
        assert self.template is not None
        classes = self.classes
        if self.own_choices:
            # Rows of another data set may have more options than the task's own.
            classes = max(classes, self._letters(rows), key=len)
            lone = next((row.id for row in rows if len(row.choices) < 2), None)
            if lone is not None:
                raise UserError(f"row {lone!r}: expected choices to score, found a row without any")
        answers = self._answers(rows, classes)
        if self.scoring == "letter" and answers and len(answers[0]) < len(classes):
            raise UserError(f"answers: expected {len(classes)}, as many as the most choices, found {len(answers[0])}")
        self._check_tokens(rows)
        fields = [fields_of(self.template, row, None if self.own_choices else self.labels) for row in rows]
        fields, truncated = self._fit(rows, fields, answers)
        counts = [len(row.choices) if self.own_choices else len(classes) for row in rows]
        labels = [self._label(row, count, labelled) for row, count in zip(rows, counts, strict=True)]
        names = [row.id for row in rows]
        answer_ids: tuple[int, ...] | None = None
        choices: list[tuple[tuple[int, ...], ...]] = [()] * len(rows)
        types: list[tuple[int, ...] | None] = [None] * len(rows)
        given: list[tuple[int, ...]] = [()] * len(rows)
        kind: Literal["answer", "text", "head"] = "answer"
        if self.scoring == "head":
            kind = "head"
            inputs = self._heads(fields)
            prompts = [ids for ids, _ in inputs]
            types = [token_types for _, token_types in inputs]
        elif self.scoring == "text":
            kind = "text"
            texts = [self._prompt(values) for values in fields]
            pairs = choice_tokens(self.tokenizer, texts, answers)
            if self.template.gap:
                starts = [[given for given, _ in self._fillings(row)] for row in rows]
                given = given_lengths(self.tokenizer, texts, starts, pairs)
            prompts = [tuple(with_lead(self.lead, prompt)) for prompt, _ in pairs]
            choices = [tuple(tuple(choice) for choice in continuations) for _, continuations in pairs]
            for name, prompt, row_choices, skipped in zip(names, prompts, choices, given, strict=True):
                predictable = bool(prompt) or (bool(skipped) and min(skipped) > 0)
                if not predictable or not all(row_choices):
                    raise UserError(
                        f"example {name!r}: expected a prompt and choices with tokens of their own, found none"
                    )
                if not self.own_choices:
                    self._check_apart(name, row_choices)
        else:
            texts = [self._prompt(values) for values in fields]
            bare, answer_ids = answer_tokens(self.tokenizer, texts, answers[0] if answers else (), names)
            prompts = [tuple(with_lead(self.lead, prompt)) for prompt in bare]
        examples = [
            Example(*parts) for parts in zip(names, prompts, choices, labels, counts, types, given, strict=True)
        ]
        pad = self.tokenizer.pad_token_id or 0
        return Encoded(examples, kind, answer_ids, classes, self.normalise, truncated, pad, truncated)

    def _answers(self, rows: Sequence[Row], classes: Sequence[str]) -> list[tuple[str, ...]]:
        """The continuations of each row's prompt; with shared answers the same tuple for every row."""
        assert self.template is not None
        space = "" if self.template.prompt[-1:].isspace() else " "
        if self.template.fixed_answers is not None:
            shared = self.template.fixed_answers
        elif self.scoring == "letter":
            shared = tuple(f"{space}{letter}" for letter in LETTERS[: len(classes)])
        elif self.template.gap:
            return [tuple(given + scored for given, scored in self._fillings(row)) for row in rows]
        elif self.own_choices:
            return [tuple(f"{space}{choice.strip()}" for choice in row.choices) for row in rows]
        else:
            shared = tuple(f"{space}{label_word(label)}" for label in self.labels)
        return [shared] * len(rows)

    def _letters(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """Names of the options of the row that has the most: letters, and numbers where these are not enough."""
        longest = max(rows, key=lambda row: len(row.choices), default=None)
        count = 0 if longest is None else len(longest.choices)
        if longest is not None and self.lettered:
            check_letters(count, f"row {longest.id!r}")
        return (*LETTERS[:count], *map(str, range(len(LETTERS) + 1, count + 1)))

    def _check_tokens(self, rows: Sequence[Row]) -> None:
        """Raise UserError for a row whose text is blank, or becomes so because the tokenizer drops its characters."""
        main = MAIN_FIELD[self.kind]
        texts = [as_text(row) if getattr(row, main) is None else getattr(row, main) for row in rows]
        blank = tokenise(self.tokenizer, ["", " "])
        for row, text, ids in zip(rows, texts, tokenise(self.tokenizer, texts), strict=True):
            if ids in blank or not text.strip():
                raise UserError(f"row {row.id!r}: expected text that the tokenizer has tokens for, found {text!r}")

    def _check_apart(self, name: str, answers: Sequence[tuple[int, ...]]) -> None:
        """Raise UserError where two classes are written by the same tokens: no likelihood could tell them apart."""
        if len(set(answers)) == len(answers):
            return
        second = next(c for c, ids in enumerate(answers) if ids in answers[:c])
        first = answers.index(answers[second])
        raise UserError(
            f"classes {self.classes[first]!r} and {self.classes[second]!r}: expected different tokens, found the "
            f"same ones in example {name!r}; give a prompt and other answers"
        )

    def _fillings(self, row: Row) -> list[tuple[str, str]]:
        return fillings(as_text(row) if row.question is None else row.question, row.choices)

    def _label(self, row: Row, count: int, labelled: bool) -> int | None:
        own_kind = (self.kind == "multiple_choice") == bool(row.choices)
        # Fixed answers, other choices: the label is an index into something else.
        foreign = self.kind == "multiple_choice" and not self.own_choices and row.choices != self.labels
        if not labelled or not own_kind or foreign or row.label is None:
            return None
        if not 0 <= row.label < count:
            raise UserError(
                f"row {row.id!r}: expected a label from 0 to {count - 1}, found {row.label}; "
                "rows with other classes are encoded with labelled=False"
            )
        return row.label

    def _prompt(self, fields: Fields) -> str:
        assert self.template is not None
        return self.template.prompt.format(**fields)

    def _heads(self, fields: Sequence[Fields]) -> list[tuple[tuple[int, ...], tuple[int, ...] | None]]:
        """Whole inputs with the tokenizer's own special tokens, and their token types where it has them."""
        assert self.template is not None
        if self.template.pair:
            main, second = self.template.fields
            inputs = [(values[main], values[second]) for values in fields]
        else:
            inputs = [(self._prompt(values), "") for values in fields]
        encoded: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [((), None)] * len(inputs)
        # A row of another kind has no second text and is encoded as a single one.
        for paired in (True, False):
            part = [index for index, (_, second_text) in enumerate(inputs) if bool(second_text) == paired]
            if not part:
                continue
            texts, pairs = ([inputs[index][side] for index in part] for side in (0, 1))
            batch = self.tokenizer(texts, pairs if paired else None, padding=False, truncation=False, verbose=False)
            types = batch.get("token_type_ids")
            for place, index in enumerate(part):
                ids = batch["input_ids"][place]
                own = len(self.lead) if tuple(ids[: len(self.lead)]) == self.lead else 0
                # Where the text begins with the leading tokens itself, those that the tokenizer has added go.
                whole = with_lead(self.lead, ids[own:]) if own else ids
                kept = None if types is None else tuple(types[place][len(ids) - len(whole) :])
                encoded[index] = tuple(whole), kept
        return encoded

    def _fit(
        self, rows: Sequence[Row], fields: list[Fields], answers: list[tuple[str, ...]]
    ) -> tuple[list[Fields], int]:
        """Fields cut to the window, and how many rows were."""
        if self.window is None:
            return fields, 0
        assert self.template is not None
        texts = [self._prompt(values) for values in fields]
        lengths = [len(ids) for ids in tokenise(self.tokenizer, texts)]
        # The batch of bare prompts finds the few rows worth an exact look: no token is shorter than a byte, of a
        # character taken apart as normalisers do, and 4 is room for special tokens.
        spare = [4 + (max(map(_most_tokens, row)) if self.scoring == "text" else 0) for row in answers]
        fitted, cut = list(fields), 0
        for index, values in enumerate(fields):
            if lengths[index] + len(self.lead) + spare[index] <= self.window:
                continue
            measure = self._measure(answers[index])
            fitted[index] = fit_fields(self.tokenizer, values, measure, self.window, f"row {rows[index].id!r}")
            cut += fitted[index] is not values
            left = [text for name, text in fitted[index].items() if name != "options"]
            if not self.template.gap and not any(left):
                raise UserError(
                    f"row {rows[index].id!r}: expected room for some of its text, found a window of {self.window} that "
                    "the choices and the prompt's fixed text fill; raise max_length or shorten them"
                )
        return fitted, cut

    def _measure(self, answers: Sequence[str]) -> Callable[[Fields], int]:
        """Tokens of the longest sequence that the model sees of a row with these fields."""

        def measure(fields: Fields) -> int:
            if self.scoring == "head":
                return len(self._heads([fields])[0][0])
            prompt = self._prompt(fields)
            texts = [prompt + answer for answer in answers] if self.scoring == "text" else [prompt]
            return max(len(with_lead(self.lead, ids)) for ids in tokenise(self.tokenizer, texts))

        return measure

    def _encode_lm(self, rows: Sequence[Row]) -> Encoded:
        starts = [row.prompt or "" for row in rows]
        ends = [[as_text(row) if row.prompt is None else row.completion or ""] for row in rows]
        examples, truncated, cut_prompts, cut_completions = [], 0, 0, 0
        for row, (start, (rest,)) in zip(rows, choice_tokens(self.tokenizer, starts, ends), strict=True):
            head, body = split_lead(self.lead, [*start, *rest])
            asked = max(len(body) - len(rest), 0)  # tokens of the prompt, without leading ones of its own
            prompt, completion = body[:asked], body[asked:]
            if completion and tuple(completion[-1:]) != self.eos:
                completion += self.eos
            if not head and not prompt:
                # Without a BOS there is nothing before the first token to predict it from.
                prompt, completion = completion[:1], completion[1:]
            if not completion:
                raise UserError(f"row {row.id!r}: expected at least two tokens to learn from, found too short a text")
            if self.window is not None and len(head) + len(prompt) + len(completion) > self.window:
                truncated += 1
                kept = max(self.window - len(completion) - len(head), 0 if head else 1)
                left = prompt[max(len(prompt) - kept, 0) :]
                room = max(self.window - len(head) - len(left), 0)
                cut_prompts += len(left) < len(prompt)
                cut_completions += room < len(completion)
                prompt, completion = left, completion[:room]
                if not completion:
                    raise UserError(f"max_length: expected room for a completion, found a window of {self.window}")
            examples.append(Example(row.id, (*head, *prompt), (tuple(completion),), None, 1))
        pad = self.tokenizer.pad_token_id or 0
        return Encoded(examples, "lm", None, (), self.normalise, truncated, pad, cut_prompts, cut_completions)


def _most_tokens(text: str) -> int:
    return len(text) if text.isascii() else len(unicodedata.normalize("NFKD", text).encode())


def _check_words(classes: Sequence[str]) -> None:
    """Raise UserError for class names that are not told apart in a prompt."""
    names: dict[str, str] = {}
    for name in classes:
        word = label_word(name)
        if not word:
            raise UserError(f"labels: expected words, found {name!r}; rename it, or give a prompt and answers")
        if word in names:
            raise UserError(
                f"labels {names[word]!r} and {name!r}: expected different words, found {word!r} for both; "
                "rename one, or give a prompt and answers"
            )
        names[word] = name
