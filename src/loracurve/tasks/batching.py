"""Batches: examples laid out in rows, by a token budget, with shared prefixes stored once.

A row may hold several examples behind their common prefix, and several choices behind one prompt: a tree of tokens,
each attending to its ancestors. In depth-first order token j is an ancestor of token i exactly when j <= i < end[j], so
one integer per token describes the mask and the 4-D mask is made on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from loracurve.system.distributed import share
from loracurve.tasks.encoding import Encoded, labels_of
from loracurve.tasks.packing import balance, pack
from loracurve.tasks.tokens import common_prefix

__all__ = ["ROW_TOKENS", "Batch", "collate", "evaluation_batches", "tree_mask"]

ROW_TOKENS = 256
"""Packed rows are filled up to so many tokens, where nobody asks for others."""


@dataclass
class Batch:
    """Examples as tensors. N rows of T tokens, E examples (of language modelling: E target tokens), C choices."""

    input_ids: Tensor
    """[N, T]"""
    scoring: str
    index: Tensor
    """[E] number of each example in its split (of its token, for language modelling)"""
    rows: Tensor
    """[E] row in which the example lies"""
    labels: Tensor
    """[E], -100 where unknown"""
    ends: Tensor | None = None
    """[N, T] end of each token's subtree; None: plain causal rows"""
    position_ids: Tensor | None = None
    """[N, T], given with `ends`"""
    attention_mask: Tensor | None = None
    """[N, T], for whole-sequence classifiers only"""
    visible: Tensor | None = None
    """[N, T] bool, False where no other token may attend to this one (causal rows); None: all are"""
    token_type_ids: Tensor | None = None
    """[N, T], encoders with sentence pairs"""
    positions: Tensor | None = None
    """[P] flat positions in [N T] that are read out"""
    targets: Tensor | None = None
    """[P] token predicted at each position (`text`, `lm`)"""
    owner: Tensor | None = None
    """[P] number of the choice, example * C + choice, that each target belongs to (`text`)"""
    choice_lengths: Tensor | None = None
    """[E, C] tokens of each choice, 0 where the choice does not exist (`text`)"""
    choice_mask: Tensor | None = None
    """[E, C] whether the choice exists (`answer`); None: all do"""
    answer_ids: Tensor | None = None
    """[C] token of each answer (`answer`)"""
    normalise: str = "sum"
    state_positions: Tensor | None = None
    """[Q] flat positions in [N T] of each choice's own scored tokens and of the last token before the choices (`text`,
    laid out `whole`)"""
    state_owners: Tensor | None = None
    """[Q] what each of them belongs to: choice, example * C + choice, or E * C + example for the prompt; further
    numbers fill up the shape"""
    slots: Tensor | None = None
    """[E] slot of each example when several adapters are trained side by side"""
    row_slots: Tensor | None = None
    """[N] the same by row"""
    units: Tensor | None = None
    """[N] example (its place in the batch) whose parts a row holds: these share a t; None: each row is its own"""
    token_units: Tensor | None = None
    """[N, T] the same by token, where examples share rows and each has a t of its own"""

    @property
    def tokens(self) -> int:
        """Size of the padded token array."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The batch with all tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def tree_mask(ends: Tensor, dtype: torch.dtype, visible: Tensor | None = None) -> Tensor:
    """[N, T] subtree ends -> [N, 1, T, T] additive mask: 0 where token i may attend to j, else the dtype's minimum.

    Tokens that are not `visible` [N, T] are attended to by themselves only.
    """
    place = torch.arange(ends.shape[1], device=ends.device)
    allowed = (place[None, :] <= place[:, None]) & (place[None, :, None] < ends[:, None, :])
    if visible is not None:
        allowed &= visible[:, None, :] | (place[None, :] == place[:, None])
    mask = torch.zeros(allowed.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


@dataclass
class _Row:
    """A row under construction: a forest of token chains, later chains hanging off earlier ones."""

    tokens: list[int]
    ends: list[int]
    depths: list[int]
    owners: list[int]
    """example that each token belongs to; of a shared prefix the first"""

    def chain(self, tokens: Sequence[int], depth: int) -> int:
        """Append a chain of tokens; returns its first index."""
        start = len(self.tokens)
        self.tokens += tokens
        self.depths += range(depth, depth + len(tokens))
        self.ends += [start + len(tokens)] * len(tokens)
        return start

    def close(self, start: int, stop: int) -> None:
        """Let the subtree of tokens start..stop-1 reach to the present end of the row."""
        self.ends[start:stop] = [len(self.tokens)] * (stop - start)


def collate(
    encoded: Encoded,
    numbers: Sequence[int],
    row_tokens: int = ROW_TOKENS,
    packing: bool = True,
    slots: Sequence[int] | None = None,
    pad_to: int = 1,
    rows: int | None = None,
    own_points: bool = False,
    whole: bool = False,
) -> Batch:
    """Lay out the examples `numbers` of a split as one batch.

    Args:
        encoded: a tokenised split.
        numbers: which examples, in order.
        row_tokens: rows are filled with whole examples up to this many tokens (a longer example has a row of its own).
        packing: whether the model takes 4-D masks; else every example, and for `text` every choice, has its own row.
        slots: for adapters trained side by side, the slot of each example, ascending; a row belongs to one slot.
        pad_to: row lengths and numbers of read-outs are padded to multiples of this, so that few shapes occur.
        rows: packed examples fill this many rows of like length for each slot, whatever `row_tokens`.
        own_points: each example can lie at a point of its own, in a packed row too, where nothing is shared then.
        whole: the last tokens of choices are in the row too, where their own hidden states are wanted (`text`).
    """
    examples = encoded.examples
    labels = labels_of([examples[i] for i in numbers])
    if encoded.scoring == "head":
        groups = [[p] for p in range(len(numbers))]
        batch = _collate_sequences(encoded, numbers, labels, pad_to)
    else:
        of_slots = [[p for p in range(len(numbers)) if not slots or slots[p] == s] for s in sorted(set(slots or [0]))]
        if not packing or row_tokens == 1:
            groups = [[p] for places in of_slots for p in places]
        elif rows is not None:
            groups = balance([encoded.sizes[i] for i in numbers], of_slots, min(rows, *map(len, of_slots)))
        else:
            groups = []
            for places in of_slots:
                packed = pack(encoded, [numbers[p] for p in places], row_tokens, not own_points)
                groups += [[places[p] for p in group] for group in packed]
        if len(groups) == len(numbers):  # a row each, in the order of whatever belongs to them
            groups.sort()
        batch = _collate_rows(encoded, numbers, labels, groups, packing, pad_to, own_points, whole)
    if slots:
        of_examples = torch.tensor(slots)
        if batch.units is not None:
            batch.row_slots = of_examples[batch.units]
        else:
            batch.row_slots = of_examples[[group[0] for group in groups]]
        batch.slots = batch.row_slots[batch.rows]
    return batch


def _collate_rows(
    encoded: Encoded,
    numbers: Sequence[int],
    labels: Tensor,
    groups: list[list[int]],
    packing: bool,
    pad_to: int,
    own_points: bool,
    whole: bool,
) -> Batch:
    """Rows of token chains for language models: one row per group of examples."""
    examples = encoded.examples
    branching = encoded.scoring == "text"
    rows: list[_Row] = []
    units: list[int] = []
    read: list[tuple[int, int, int, int]] = []  # row, place in row, target, owner
    states: list[tuple[int, int, int]] = []  # row, place in row, owner
    example_rows = torch.zeros(len(numbers), dtype=torch.long)
    width = encoded.most_choices if branching else 1
    for group in groups:
        several = len(group) > 1 and not own_points
        prefix = common_prefix([examples[numbers[p]].prompt for p in group]) if several else 0
        row = _Row([], [], [], [])
        row.chain(examples[numbers[group[0]]].prompt[:prefix], 0)
        rows.append(row)
        units.append(group[0])
        for p in group:
            example = examples[numbers[p]]
            example_rows[p] = len(rows) - 1
            start = row.chain(example.prompt[prefix:], prefix)
            stop = len(row.tokens)
            asks = stop - 1 if stop > start else prefix - 1
            if encoded.scoring == "answer":
                read.append((len(rows) - 1, asks, 0, p))
            for c, choice in enumerate(example.choices):
                if c and not packing:
                    row.close(start, stop)
                    row = _Row([], [], [], [])
                    row.chain(example.prompt, 0)
                    rows.append(row)
                    units.append(p)
                branch = row.chain(choice if whole and branching else choice[:-1], len(example.prompt))
                places = [asks, *range(branch, branch + len(choice) - 1)]
                skipped = example.given[c] if example.given else 0
                scored = list(zip(places, choice, strict=True))[skipped:]
                read += [(len(rows) - 1, place, token, p * width + c) for place, token in scored]
                own = range(branch + skipped, branch + len(choice))
                states += [(len(rows) - 1, place, p * width + c) for place in own]
            states.append((len(rows) - 1, max(asks, 0), len(numbers) * width + p))
            row.close(start, stop)
            row.owners += [p] * (len(row.tokens) - len(row.owners))
        row.close(0, prefix)
    read.sort(key=lambda entry: entry[3])  # in the examples' order, whatever rows they lie in
    batch = _tensors(encoded, numbers, labels, rows, units, read, example_rows, width, pad_to)
    if whole and branching:
        _read_states(batch, states, len(numbers) * (width + 1), pad_to)
    if own_points and len(groups) < len(numbers):
        size = batch.input_ids.shape[1]
        batch.token_units = torch.tensor([r.owners + [0] * (size - len(r.owners)) for r in rows])
    return batch


def _tensors(
    encoded: Encoded,
    numbers: Sequence[int],
    labels: Tensor,
    rows: list[_Row],
    units: list[int],
    read: list[tuple[int, int, int, int]],
    example_rows: Tensor,
    width: int,
    pad_to: int,
) -> Batch:
    """Pad the rows and turn the read-outs into tensors."""
    size = _padded(max(len(r.tokens) for r in rows), pad_to)
    if encoded.scoring == "text":
        # Read-outs that fill up the shape belong to one choice too many, which is dropped after summing.
        read = read + [(0, 0, 0, len(numbers) * width)] * (_padded(len(read), pad_to) - len(read))
    input_ids = torch.tensor([r.tokens + [0] * (size - len(r.tokens)) for r in rows])
    row_index, place, targets, owner = (torch.tensor(column) for column in zip(*read, strict=True))
    batch = Batch(
        input_ids, encoded.scoring, torch.tensor(numbers), example_rows, labels, positions=row_index * size + place
    )
    if any(end < len(r.tokens) for r in rows for end in r.ends):
        # A padding token attends to itself only, so that no row of the softmax is empty.
        batch.ends = torch.tensor([r.ends + list(range(len(r.tokens) + 1, size + 1)) for r in rows])
        batch.position_ids = torch.tensor([r.depths + [0] * (size - len(r.tokens)) for r in rows])
    if len(set(units)) < len(units):
        batch.units = torch.tensor(units)
    if encoded.scoring == "answer":
        assert encoded.answer_ids is not None
        batch.answer_ids = torch.tensor(encoded.answer_ids)
        counts = torch.tensor([encoded.examples[i].n_choices or len(encoded.answer_ids) for i in numbers])
        if bool((counts < len(encoded.answer_ids)).any()):
            batch.choice_mask = torch.arange(len(encoded.answer_ids)) < counts[:, None]
    elif encoded.scoring == "text":
        batch.targets, batch.owner, batch.normalise = targets, owner, encoded.normalise
        lengths = torch.bincount(owner, minlength=len(numbers) * width)
        batch.choice_lengths = lengths[: len(numbers) * width].view(-1, width)
    else:
        # Language modelling: every target token is an example of its own, numbered by split position and place.
        batch.targets = batch.labels = targets
        batch.rows, batch.index = row_index, torch.tensor([encoded.token_offsets[numbers[p]] for p in owner.tolist()])
        first = torch.cat([torch.tensor([True]), owner[1:] != owner[:-1]])
        count = torch.arange(len(owner))
        batch.index += count - torch.cummax(torch.where(first, count, 0), 0).values
    return batch


def _read_states(batch: Batch, states: list[tuple[int, int, int]], owners: int, pad_to: int) -> None:
    """Note where hidden states (row, place, owner) are read."""
    states = states + [(0, 0, owners)] * (_padded(len(states), pad_to) - len(states))
    row, place, owner = (torch.tensor(column) for column in zip(*states, strict=True))
    batch.state_positions, batch.state_owners = row * batch.input_ids.shape[1] + place, owner


def _padded(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple, of larger ones for larger sizes: four in each octave, a quarter more at most."""
    if multiple > 1:
        multiple <<= max((size // multiple).bit_length() - 3, 0)
    return -(-size // multiple) * multiple


def _collate_sequences(encoded: Encoded, numbers: Sequence[int], labels: Tensor, pad_to: int) -> Batch:
    """Whole sequences with a padding mask, for sequence classifiers."""
    examples = [encoded.examples[i] for i in numbers]
    size = _padded(max(len(e.prompt) for e in examples), pad_to)
    pad = encoded.pad_id
    batch = Batch(
        torch.tensor([[*e.prompt, *[pad] * (size - len(e.prompt))] for e in examples]),
        encoded.scoring,
        torch.tensor(numbers),
        torch.arange(len(numbers)),
        labels,
        attention_mask=torch.tensor([[1] * len(e.prompt) + [0] * (size - len(e.prompt)) for e in examples]),
    )
    if all(e.token_types is not None for e in examples):
        batch.token_type_ids = torch.tensor([[*e.token_types, *[0] * (size - len(e.prompt))] for e in examples])  # type: ignore[misc]
    return batch


def evaluation_batches(
    encoded: Encoded,
    tokens_per_batch: int = 4096,
    row_tokens: int = ROW_TOKENS,
    packing: bool = True,
    pad_to: int = 1,
    shared: bool = False,
    whole: bool = False,
) -> Iterator[Batch]:
    """All examples of a split, sorted by length, in batches of at most `tokens_per_batch` padded tokens.

    No example is dropped; one longer than the budget is a batch of its own. `pad_to` and `whole` as for `collate`. With
    `shared`, several processes have a share of the examples each, of like lengths.
    """
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded.examples[i].prompt), encoded.examples[i].prompt))
    order = [*share(order)] if shared else order
    sizes = [encoded.sizes[i] for i in order]
    start = 0
    while start < len(order):
        stop, longest, total = start, 0, 0
        while stop < len(order):
            longest, total = max(longest, sizes[stop]), total + sizes[stop]
            # Packed rows hold what they are given; single rows are padded to the longest.
            needed = total if packing and encoded.scoring != "head" else longest * (stop - start + 1)
            if stop > start and needed > tokens_per_batch:
                break
            stop += 1
        yield collate(encoded, order[start:stop], row_tokens, packing, pad_to=pad_to, whole=whole)
        start = stop
