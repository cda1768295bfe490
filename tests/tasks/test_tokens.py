"""Answers that are no single token, and leading special tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.texts import classes
from helpers.tokenizers_made import bert_style, qwen_style
from tokenizers import Tokenizer, models, processors
from transformers import ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from loracurve.system.errors import UserError
from loracurve.tasks.task import load_task
from loracurve.tasks.tokens import answer_tokens, leading_tokens, split_lead, tokenise, with_lead


def test_answer_errors_name_answer_tokens_and_example(tmp_path: Path) -> None:
    def fails(said: str, prompt: str, answers: list[str]) -> None:
        with pytest.raises(UserError, match=said) as caught:
            load_task(classes(tmp_path, prompt=prompt, answers=answers), qwen_style()).encode("train")
        assert "\n" not in str(caught.value)

    fails(
        "' unfathomable': expected exactly one token after the prompt of example '0'",
        "{text} is",
        ["unfathomable", "A"],
    )
    # "(" + "a" is "a", but "is" + "a" is "is", "##a".
    with pytest.raises(UserError, match="expected the same token after every prompt, found '##a' in example 'second'"):
        answer_tokens(bert_style(), ["is (", "is"], ["a"], ["first", "second"])
    fails("expected different tokens", "{text} is", ["positive", " positive "])
    fails("in place of the prompt's own", "{text} is ", ["positive", "negative"])
    fails("expected 2 for the classes", "{text} is", ["positive"])
    with pytest.raises(UserError, match=r"answer ' \u4e2d': expected a token of the vocabulary, found '\[UNK\]'"):
        answer_tokens(bert_style(), ["is"], [" \u4e2d"], ["first"])


@pytest.mark.parametrize(
    ("lead", "ids", "head", "rest"),
    [
        ((), [7, 8], [], [7, 8]),
        ((1,), [], [1], []),
        ((1,), [7, 1], [1], [7, 1]),
        ((1,), [1, 7], [1], [7]),
        ((1,), [1, 1, 7], [1], [1, 7]),
        ((1, 2), [7], [1, 2], [7]),
        ((1, 2), [1, 2, 7], [1, 2], [7]),
        ((1, 2), [2, 7], [1, 2], [7]),
        ((1, 2), [1, 7], [1], [7]),
    ],
)
def test_leading_tokens_stand_once(lead: tuple[int, ...], ids: list[int], head: list[int], rest: list[int]) -> None:
    assert split_lead(lead, ids) == (head, rest)
    assert with_lead(lead, ids) == head + rest == with_lead(lead, head + rest)


def test_leading_tokens_of_unusual_tokenizers() -> None:
    """Nucleotides, where no letter of the probe has a token; bytes and characters, without a fast tokenizer."""
    nucleotides = Tokenizer(models.BPE(vocab={"A": 0, "C": 1, "G": 2, "T": 3, "<s>": 4, "</s>": 5}, merges=[]))
    nucleotides.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 5)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=nucleotides, bos_token="<s>", eos_token="</s>")
    assert tokenise(tokenizer, ["a"]) == [[]] and leading_tokens(tokenizer) == (4,)
    nucleotides.add_tokens(["<x>"])
    assert leading_tokens(PreTrainedTokenizerFast(tokenizer_object=nucleotides)) == (4,)
    assert leading_tokens(ByT5Tokenizer()) == ()
    characters = CanineTokenizer()
    assert leading_tokens(characters) == (characters.cls_token_id,)
