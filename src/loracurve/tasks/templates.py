"""Prompt templates: named, versioned and hashed, so that every result says which prompt it was made with.

A template is a `str.format` text with plain fields. The same function formats in-distribution and out-of-distribution
rows; a row of another kind goes into the main field of the task's own prompt, so the format never betrays the data.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loracurve.system.errors import UserError, nearest
from loracurve.tasks.cloze import split_gap
from loracurve.tasks.dataset import Kind, Row, as_text

__all__ = [
    "LETTERS",
    "TEMPLATES",
    "Template",
    "check_letters",
    "custom_template",
    "default_template",
    "fields_of",
    "label_word",
]


LETTERS = string.ascii_uppercase

Form = Literal["letter", "label", "text", "head"]

FIELDS: dict[Kind, tuple[str, ...]] = {
    "classification": ("text", "text2", "options"),
    "multiple_choice": ("question", "context", "options"),
    "language_modelling": (),
}

MAIN_FIELD: dict[Kind, str] = {"classification": "text", "multiple_choice": "question", "language_modelling": "text"}


@dataclass(frozen=True)
class Template:
    """A prompt and what continues it.

    `answer` shows the continuation: " {letter}", " {label}", " {choice}", the custom answers, or "" for a head.
    `fixed_answers` are a template's own answer words in class order, where it has any. With `pair` the two fields go
    to the tokenizer as text and text_pair, and `prompt` only describes them. With `gap` the prompt ends where the
    question has its gap, a choice fills it, and what follows is scored. Change the text, raise the version: results
    name ``name@version:hash``.
    """

    name: str
    version: int
    kind: Kind
    form: Form
    prompt: str
    answer: str
    fixed_answers: tuple[str, ...] | None = None
    pair: bool = False
    gap: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of the prompt, in order of appearance."""
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None))

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of prompt and answers."""
        return hashlib.sha256(f"{self.prompt}{self.answer}".encode()).hexdigest()[:12]

    @property
    def id(self) -> str:
        """``name@version:hash``."""
        return f"{self.name}@{self.version}:{self.hash}"


def _table() -> dict[str, Template]:
    choice: Kind = "multiple_choice"
    classes: Kind = "classification"
    passage, pair = "Passage: {context}\n", "Text 1: {text}\nText 2: {text2}\n"
    question, options = "Question: {question}\n", "{options}\n"
    templates = (
        Template("choice_letter", 1, choice, "letter", f"{question}{options}Answer:", " {letter}"),
        Template("choice_letter_context", 1, choice, "letter", f"{passage}{question}{options}Answer:", " {letter}"),
        Template("choice_text", 1, choice, "text", f"{question}Answer:", " {choice}"),
        Template("choice_text_context", 1, choice, "text", f"{passage}{question}Answer:", " {choice}"),
        Template("choice_gap", 1, choice, "text", "{question}", "{choice}{rest}", gap=True),
        Template("choice_label", 1, choice, "label", f"{question}Answer:", " {label}"),
        Template("choice_label_context", 1, choice, "label", f"{passage}{question}Answer:", " {label}"),
        Template("choice_head", 1, choice, "head", "{question}", ""),
        Template("choice_head_context", 1, choice, "head", "{question} | {context}", "", pair=True),
        Template("class_letter", 1, classes, "letter", f"Text: {{text}}\n{options}Answer:", " {letter}"),
        Template("class_letter_pair", 1, classes, "letter", f"{pair}{options}Answer:", " {letter}"),
        Template("class_label", 1, classes, "label", "Text: {text}\nLabel:", " {label}"),
        Template("class_label_pair", 1, classes, "label", f"{pair}Label:", " {label}"),
        Template("class_text", 1, classes, "text", "Text: {text}\nLabel:", " {label}"),
        Template("class_text_pair", 1, classes, "text", f"{pair}Label:", " {label}"),
        Template("class_head", 1, classes, "head", "{text}", ""),
        Template("class_head_pair", 1, classes, "head", "{text} | {text2}", "", pair=True),
        Template(
            "word_sentiment",
            1,
            classes,
            "label",
            "The sentiment of the word {text} is",
            " negative| positive",
            (" negative", " positive"),
        ),
    )
    return {template.name: template for template in templates}


TEMPLATES: dict[str, Template] = _table()


def default_template(kind: Kind, form: Form, second_text: bool) -> Template:
    """The built-in template for rows of `kind` scored by `form`; `second_text`: rows have text2 or a context."""
    prefix, suffix = ("choice", "_context") if kind == "multiple_choice" else ("class", "_pair")
    return TEMPLATES[f"{prefix}_{form}{suffix if second_text else ''}"]


def custom_template(kind: Kind, form: Form, prompt: str, answers: Sequence[str] | None) -> Template:
    """A template from a user's own `prompt` (fields: see `FIELDS`) and `answers`, one for each class.

    An answer gets the space that separates it from the prompt, unless the prompt ends in white space itself.
    Raises UserError for unknown fields and malformed braces.
    """
    valid = FIELDS[kind]
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise UserError(f"prompt {prompt!r}: {error}; write {{{{ and }}}} for literal braces") from None
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if name not in valid or spec or conversion:
            raise UserError(f"prompt: expected fields from {', '.join(valid)}, found {{{name}}}{nearest(name, valid)}")
    texts = None if answers is None else tuple(_spaced(prompt, answer) for answer in answers)
    shown = (
        "|".join(texts) if texts else {"letter": " {letter}", "label": " {label}", "head": ""}.get(form, " {choice}")
    )
    template = Template("custom", 1, kind, form, prompt, shown, texts)
    if MAIN_FIELD[kind] not in template.fields:
        raise UserError(f"prompt: expected the field {{{MAIN_FIELD[kind]}}} in it, found {prompt!r}")
    return template


def _spaced(prompt: str, answer: str) -> str:
    word = answer.strip()
    if not word:
        raise UserError(f"answers: expected words, found {answer!r}")
    return word if prompt[-1:].isspace() else f" {word}"


def label_word(label: str) -> str:
    """A class name as it is written in prompts: underscores are spaces, and none stands at its ends."""
    return label.replace("_", " ").strip()


def check_letters(count: int, where: str) -> None:
    """Raise UserError where `count` options cannot have a letter each."""
    if count > len(LETTERS):
        raise UserError(
            f"{where}: expected at most {len(LETTERS)} options, one for each letter, found {count}; "
            "use scoring label, text or head, and a prompt without {options}"
        )


def fields_of(template: Template, row: Row, classes: Sequence[str] | None) -> dict[str, str]:
    """The values of the template's fields for a row of any kind.

    `classes`: the task's class names, listed as {options}; None where each row lists its own choices. A row of another
    kind gives its plain text to the main field and leaves the second one empty.

    Raises UserError for a row without choices, or with more than there are letters, in a prompt that lists them.
    """
    main = MAIN_FIELD[template.kind]
    own = getattr(row, main)
    text = own if own is not None else as_text(row)
    values = {main: split_gap(text)[0] if template.gap else text}
    second = "context" if template.kind == "multiple_choice" else "text2"
    values[second] = (getattr(row, second) or "") if own is not None else ""
    if "options" in template.fields:
        listed = row.choices if classes is None else tuple(label_word(name) for name in classes)
        if not listed:
            raise UserError(
                f"row {row.id!r}: expected choices for the prompt {template.name!r}, found a row without any"
            )
        check_letters(len(listed), f"row {row.id!r}")
        values["options"] = "\n".join(f"{LETTERS[i]}. {text}" for i, text in enumerate(listed))
    return {name: values[name] for name in template.fields}
