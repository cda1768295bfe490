"""A first configuration for somebody's own data, with what was assumed of them in comments."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import yaml

from loracurve.system.errors import one_line
from loracurve.tasks.config import Scoring
from loracurve.tasks.dataset import Dataset, as_text
from loracurve.tasks.task import open_dataset
from loracurve.tasks.templates import LETTERS, default_template, label_word
from loracurve.training.config import steps_for

__all__ = ["config_for"]

_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_MOST = {"validation": 500, "test": 2000}
"""rows that are looked at again and again, or predicted by ten points"""

_SHOWN = 30
"""classes that are listed with their numbers of rows"""


def config_for(data: str) -> tuple[str, list[str], str]:
    """The text of a YAML file that `loracurve fit` runs, lines that say what was assumed, and a folder for the run.

    Args:
        data: a file or a folder, or any other data that `open_dataset` knows.

    Raises:
        UserError: as `open_dataset`, which says what cannot be guessed.
    """
    dataset = open_dataset(data)
    scoring, reason = _scoring(dataset)
    sizes = {split: len(rows) for split, rows in dataset.splits.items()}
    steps = steps_for(sizes["train"])
    longest = max(len(as_text(row)) for row in dataset.rows("train"))
    counts = _counts(dataset)
    assumed = [
        f"{data}: {dataset.kind.replace('_', ' ')}, {', '.join(f'{n} {s}' for s, n in sizes.items())} rows",
        *([dataset.notes] if dataset.columns else []),
        *([f"classes: {counts}"] if counts else []),
        f"scoring {scoring}: {reason}",
        f"{steps} steps for {sizes['train']} training rows",
    ]
    lines = [
        "# Made by loracurve init: a guess to look at. loracurve fit --help explains each option.",
        "",
        "model:",
        f"  name: {_MODEL}  # or a folder",
        "  dtype: bfloat16",
        "",
        "task:",
        f"  data: {_quoted(data)}",
        *_columns(dataset),
        *([f"  # classes with their training rows: {one_line(counts, 2000)}"] if counts else []),
        f"  scoring: {scoring}  # {reason}",
        *_template(dataset, scoring),
        f"  # max_length: 512  # tokens; the longest training text has {longest} characters",
        *(f"  limit_{s}: {most}  # of {sizes[s]}" for s, most in _MOST.items() if sizes.get(s, 0) > most),
        "",
        "lora: {r: 8, lora_alpha: 16}",
        "",
        "curve: {kind: free, segments: 4}",
        "",
        "curve_training:",
        f"  steps: {steps}  # of 16 rows; raise it where the loss still falls at the end",
        "",
        "evaluation: {points: 10}",
    ]
    return "\n".join(lines) + "\n", [one_line(line, 2000) for line in assumed], f"runs/{_folder(dataset.name)}"


def _scoring(dataset: Dataset) -> tuple[Scoring, str]:
    """How answers are scored, and why: what works whatever the classes are called and however they are tokenised."""
    if dataset.kind == "language_modelling":
        return "lm", "there are texts and no labels"
    if dataset.kind == "multiple_choice":
        return "letter", "choices are listed and their letters compared"
    if len(dataset.labels) > len(LETTERS):
        return "head", f"a new head, for {len(dataset.labels)} classes are more than there are letters"
    if len({label_word(name).casefold() for name in dataset.labels}) < len(dataset.labels):
        return "head", "a new head, for some classes are the same words"
    return "letter", "classes are listed and their letters compared; label if each is a word of one token"


def _counts(dataset: Dataset) -> str:
    """Classes with the numbers of their training rows."""
    if dataset.kind != "classification":
        return ""
    found = Counter(row.label for row in dataset.rows("train"))
    shown = [f"{one_line(name, 60)} {found[number]}" for number, name in enumerate(dataset.labels)]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _columns(dataset: Dataset) -> list[str]:
    if not dataset.columns:
        return []
    lines = ["  columns:", *(f"    {meaning}: {_quoted(name)}" for meaning, name in dataset.columns.items())]
    if "group" not in dataset.columns:
        lines.append("    # group: COLUMN  # rows of one person or document, which then stay in one split")
    return lines


def _template(dataset: Dataset, scoring: Scoring) -> list[str]:
    if scoring == "lm":
        return []
    second = "context" if dataset.kind == "multiple_choice" else "text2"
    pairs = any(getattr(row, second) for rows in dataset.splits.values() for row in rows)
    template = default_template(dataset.kind, scoring, pairs)
    return [
        f"  template: {template.name}  # {_quoted(template.prompt)}",
        "  # prompt: a prompt of your own in place of the template, with the same fields in braces",
    ]


def _quoted(text: str) -> str:
    return str(yaml.safe_dump(text, default_style='"', allow_unicode=True, width=10**9)).strip()


def _folder(name: str) -> str:
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(name).name).strip("-")
    return plain or "mine"
