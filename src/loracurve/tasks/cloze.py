"""Sentences with a gap (WinoGrande): each choice is put into it, and what follows is scored.

Partial scoring (Trinh & Le 2018, arXiv 1806.02847; Sakaguchi et al. 2019, arXiv 1907.10641, and lm-evaluation-harness):
the continuation behind the gap is the same for all choices, so that its log-likelihood asks which choice makes it
likely, and neither length nor frequency of the choices themselves counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loracurve.tasks.tokens import common_prefix, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["fillings", "given_lengths", "has_gap", "split_gap"]


# A blank of three underscores or more, or a shorter one that stands for a word: beside a letter or a digit it is part
# of a name (get_value, __init__), beside a bracket, ^ or $ of a formula. Scripts without spaces may touch it.
_LETTERS = "0-9A-Za-z_\u00c0-\u024f\u0370-\u03ff\u0400-\u052f"
_GAP = re.compile(rf"_{{3,}}|(?<![{_LETTERS}^$)}}\]])_+(?![{_LETTERS}^$({{\[])")


def has_gap(text: str | None) -> bool:
    """Whether a text has exactly one gap: a run of underscores that stands for a word, or three and more anywhere."""
    return text is not None and len(_GAP.findall(text)) == 1


def split_gap(text: str) -> tuple[str, str]:
    """What stands before and behind the gap; a text without exactly one has it at its end.

    White space before the gap belongs to the choice's first token and is left out of the first part.
    """
    if not has_gap(text):
        return text.rstrip(), ""
    before, behind = _GAP.split(text)
    return before.rstrip(), behind.rstrip()


def fillings(text: str, choices: Sequence[str]) -> list[tuple[str, str]]:
    """For each choice what it puts into the gap, with the space before it, and what is scored behind it.

    Where nothing stands behind the gap the first is empty and the choice itself is scored.
    """
    before, behind = split_gap(text)
    at_end = not has_gap(text)
    space = " " if before and (at_end or _GAP.split(text)[0][-1:].isspace()) else ""
    filled = [f"{space}{choice.strip()}" for choice in choices]
    return [(choice, behind) if behind else ("", choice) for choice in filled]


def given_lengths(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    given: Sequence[Sequence[str]],
    tokens: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
) -> list[tuple[int, ...]]:
    """How many tokens of each continuation write the text that is given; a token that reaches further is scored.

    Args:
        tokenizer: of `tokens`.
        prompts: of each row.
        given: start of each continuation, of each row.
        tokens: of prompts and continuations, as `choice_tokens` returns them.
    """
    starts = iter(tokenise(tokenizer, [p + text for p, row in zip(prompts, given, strict=True) for text in row]))
    found = []
    for row, (prompt, continuations) in zip(given, tokens, strict=True):
        lengths = []
        for text, continuation in zip(row, continuations, strict=True):
            shared = common_prefix([next(starts), [*prompt, *continuation]]) - len(prompt)
            lengths.append(max(shared, 0) if text else 0)
        found.append(tuple(lengths))
    return found
