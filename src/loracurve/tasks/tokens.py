"""From prompts to token ids: answers as continuations of the real prompt, leading special tokens, cutting to a window.

Nothing here relies on where a tokenizer puts its special tokens: text is tokenised without any, and the leading ones
(BOS, [CLS] or none) are put in front by hand, so that no EOS ever ends a prompt whose continuation is to be read, and
no BOS stands twice where the text itself begins with one, as chat templates write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from loracurve.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "answer_tokens",
    "choice_tokens",
    "common_prefix",
    "cut_left",
    "fit_fields",
    "leading_tokens",
    "split_lead",
    "tokenise",
    "with_lead",
]


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without special tokens, padding or truncation."""
    if not texts:
        return []
    # verbose=False: texts longer than the window are dealt with, and reported, by the task.
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts in front of a text by default: BOS, [CLS], or none.

    Raises UserError where they cannot be told from the text's own tokens.
    """
    for probe in _probes(tokenizer):
        bare = tokenise(tokenizer, [probe])[0]
        if not bare:
            continue
        full = list(tokenizer(probe, add_special_tokens=True)["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start])
        raise UserError(f"tokenizer {tokenizer.name_or_path!r}: text is tokenised differently beside special tokens")
    raise UserError(f"tokenizer {tokenizer.name_or_path!r}: expected a vocabulary of text, found special tokens only")


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts without special tokens. A small alphabet (nucleotides, moves) may drop letters, but no word of its own."""
    yield "a"
    special = tokenizer.get_added_vocab()
    yield from (token for token in sorted(tokenizer.get_vocab()) if token not in special)


def split_lead(lead: Sequence[int], ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """(special tokens in front, the rest) of a text's tokens `ids` behind the tokenizer's leading tokens `lead`.

    A text that begins with some of them itself keeps those, and gets what stands before them in `lead` only.
    """
    start = lead.index(ids[0]) if ids and ids[0] in lead else len(lead)
    own = common_prefix([lead[start:], ids])
    return [*lead[:start], *ids[:own]], list(ids[own:])


def with_lead(lead: Sequence[int], ids: Sequence[int]) -> list[int]:
    """A text's tokens behind the leading special tokens, which stand once (`split_lead`)."""
    head, rest = split_lead(lead, ids)
    return head + rest


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix of all sequences."""
    shortest = min(map(len, sequences))
    first = sequences[0]
    for position in range(shortest):
        if any(sequence[position] != first[position] for sequence in sequences[1:]):
            return position
    return shortest


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str], ids: Sequence[str]
) -> tuple[list[list[int]], tuple[int, ...]]:
    """(tokens of each prompt, token id of each answer): every answer must continue every prompt by one token, the same
    for all prompts and different for different answers.

    `ids` name the examples in messages. Raises UserError naming the answer and its tokens otherwise.
    """
    prompt_ids = tokenise(tokenizer, prompts)
    found: list[int] = []
    for answer in answers:
        expected: int | None = None
        for name, ids_of_prompt, full in zip(
            ids, prompt_ids, tokenise(tokenizer, [prompt + answer for prompt in prompts]), strict=True
        ):
            if len(full) != len(ids_of_prompt) + 1 or full[:-1] != ids_of_prompt:
                kept = common_prefix([ids_of_prompt, full])
                tokens = tokenizer.convert_ids_to_tokens(full[kept:])
                after = tokenizer.convert_ids_to_tokens(ids_of_prompt[kept:])
                merged = f", in place of the prompt's own {after}" if after else ""
                raise UserError(
                    f"answer {answer!r}: expected exactly one token after the prompt of example {name!r}, "
                    f"found {tokens}{merged}; use other answers, letters, or scoring: text"
                )
            if expected is not None and full[-1] != expected:
                pair = tokenizer.convert_ids_to_tokens([expected, full[-1]])
                raise UserError(
                    f"answer {answer!r}: expected the same token after every prompt, "
                    f"found {pair[1]!r} in example {name!r} "
                    f"and {pair[0]!r} before it; end the prompt with a fixed cue such as 'Answer:'"
                )
            expected = full[-1]
        if expected is not None and expected == tokenizer.unk_token_id:
            raise UserError(f"answer {answer!r}: expected a token of the vocabulary, found {tokenizer.unk_token!r}")
        if expected is None:
            raise UserError("expected at least one example to find the answer tokens with, found none")
        if expected in found:
            twin = answers[found.index(expected)]
            raise UserError(f"answers {twin!r} and {answer!r}: expected different tokens, found the same one for both")
        found.append(expected)
    return prompt_ids, tuple(found)


def choice_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[tuple[list[int], list[list[int]]]]:
    """For each prompt its tokens and those of each of its continuations, without special tokens.

    Where the tokenizer merges across the boundary the prompt ends earlier, at the longest prefix that the prompt and
    all its continuations share, so that prompt + continuation is always how the tokenizer writes the whole text.
    """
    prompt_ids = tokenise(tokenizer, prompts)
    whole = iter(tokenise(tokenizer, [p + c for p, row in zip(prompts, choices, strict=True) for c in row]))
    result = []
    for ids, row in zip(prompt_ids, choices, strict=True):
        full = [next(whole) for _ in row]
        shared = common_prefix([ids, *full])
        result.append((ids[:shared], [sequence[shared:] for sequence in full]))
    return result


def cut_left(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """`text` without its first `tokens` tokens (at least one character shorter)."""
    if tokenizer.is_fast:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        # One character can be several tokens with the same start, hence the minimum.
        start = max(int(offsets[tokens][0]), 1) if tokens < len(offsets) else len(text)
    else:
        start = min(max(-(-len(text) * tokens // max(len(tokenise(tokenizer, [text])[0]), 1)), 1), len(text))
    return text[start:].lstrip()


def fit_fields(
    tokenizer: PreTrainedTokenizerBase,
    fields: dict[str, str],
    measure: Callable[[dict[str, str]], int],
    window: int,
    where: str,
) -> dict[str, str]:
    """Cut the longest variable text from its left until `measure(fields)` is at most `window` tokens.

    Options, and all the literal text with the answer cue at its end, stay whole. Raises UserError where they alone are
    too long.
    """
    while (excess := measure(fields) - window) > 0:
        variable = {name: text for name, text in fields.items() if name != "options"}
        longest = max(variable, key=lambda name: len(variable[name]), default=None)
        if longest is None or not variable[longest]:
            raise UserError(
                f"{where}: the choices and the prompt's fixed text alone are {excess} tokens longer than the window of "
                f"{window}; raise max_length or shorten them"
            )
        fields = {**fields, longest: cut_left(tokenizer, fields[longest], excess)}
    return fields
