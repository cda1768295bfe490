"""How many rows the examples of a split are packed into."""

from __future__ import annotations

from loracurve.tasks.encoding import Encoded, Example
from loracurve.tasks.packing import packed_rows


def test_rows_of_a_split_follow_its_lengths() -> None:
    def split(*sizes: int, prefix: int = 0) -> Encoded:
        prompts = [(*range(prefix), *(100 + i for _ in range(n - prefix))) for i, n in enumerate(sizes)]
        examples = [Example(str(i), p, (), 0, 2) for i, p in enumerate(prompts)]
        return Encoded(examples, "answer", (1, 2), ("a", "b"), "sum", 0)

    varied = split(*[10] * 15, 90)  # 15 tokens on average; 16 examples of which one has 90: 240 in all
    assert packed_rows(varied, 16, 64) == 4
    assert packed_rows(varied, 16, 10_000) == 1
    assert packed_rows(split(*[20] * 16), 16, 64) == 16  # equal lengths: nothing to save
    assert packed_rows(split(*[20] * 16, prefix=16), 16, 64) == 1  # 4 tokens of its own each: 16 + 16 * 4 in all
    assert packed_rows(varied, 1, 64) == 1
