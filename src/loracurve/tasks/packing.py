"""Which examples share a row: as many as fit, or a given number of rows of like length."""

from __future__ import annotations

from collections.abc import Sequence

from loracurve.tasks.encoding import Encoded
from loracurve.tasks.tokens import common_prefix

__all__ = ["WORTH_PACKING", "balance", "pack", "packed_rows"]


# Packed rows need a mask and longer attention: they must save at least this part of the padded tokens.
WORTH_PACKING = 0.2


def pack(encoded: Encoded, numbers: Sequence[int], row_tokens: int, share_prefix: bool = True) -> list[list[int]]:
    """Fill rows in the given order while prefix + own parts fit into `row_tokens`; returns positions in `numbers`.

    Without `share_prefix` each example brings its own. One example a row where packing would save little: prompts of
    like length without a long common prefix.
    """
    prefix = common_prefix([encoded.examples[i].prompt for i in numbers]) if share_prefix else 0
    rows: list[list[int]] = []
    used = longest = 0
    for place, i in enumerate(numbers):
        own = encoded.sizes[i] - prefix
        if rows and used + own <= row_tokens:
            rows[-1].append(place)
            used += own
        else:
            rows.append([place])
            used = prefix + own
        longest = max(longest, used)
    apart = len(numbers) * max(encoded.sizes[i] for i in numbers)
    if len(rows) * longest > (1 - WORTH_PACKING) * apart:
        return [[place] for place in range(len(numbers))]
    return rows


def packed_rows(encoded: Encoded, examples: int, row_tokens: int, share_prefix: bool = True) -> int:
    """How many rows of about `row_tokens` so many examples of a split fill on average; one each where packing them
    would save little. The same for all batches of a size, so that few shapes occur."""
    prefix = encoded.prefix if share_prefix else 0
    own = encoded.total_size / len(encoded) - prefix
    rows = max(round(examples * own / max(row_tokens - prefix, own)), 1)
    # What the longest of so many examples has, typically: rows of one example would all be padded to it.
    longest = encoded.sorted_sizes[len(encoded) * (examples - 1) // examples]
    packed = rows * prefix + examples * own
    return rows if rows < examples and packed < (1 - WORTH_PACKING) * examples * longest else examples


def balance(sizes: Sequence[int], slots: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Examples of `sizes` tokens in `count` rows for each slot, of like lengths: the longest first, each into the row
    with the fewest tokens."""
    groups: list[list[int]] = []
    for places in slots:
        rows: list[list[int]] = [[] for _ in range(count)]
        used = [0] * count
        for p in sorted(places, key=lambda p: -sizes[p]):
            shortest = used.index(min(used))
            rows[shortest].append(p)
            used[shortest] += sizes[p]
        groups += rows
    return groups
