"""Corrupted copies of inputs, on which points of the curve may disagree.

A diversity term on the training inputs themselves pays for disagreement where the labels are known. On inputs slightly
off the data it can ask for disagreement there and leave the likelihood alone (the LoRA-Curve authors; random
replacement of input tokens goes back to Devlin et al. 2019, section 3.1, random loss of attention to key positions to
Zehui et al. 2019, DropAttention). A corruption is drawn once and seen by all points of the curve.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from loracurve.system.errors import UserError
from loracurve.system.paths import is_file, read_text
from loracurve.tasks.batching import Batch
from loracurve.tasks.dataset import Row, read_rows
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["allowed_positions", "corrupt", "drop_attention", "ordinary_tokens", "random_tokens", "unlabelled"]


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids ``[V']``, ascending, of the tokens that may be replaced and drawn: all but special and added ones."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return torch.tensor([i for i in range(len(tokenizer)) if i not in special])


def random_tokens(
    input_ids: Tensor,
    allowed: Tensor,
    rate: float,
    vocabulary: Tensor,
    generator: torch.Generator,
    units: Tensor | None = None,
) -> Tensor:
    """Replace tokens by others, drawn uniformly; each row's share is itself uniform between 0 and `rate`.

    Args:
        input_ids: long ``[N, T]``.
        allowed: bool ``[N, T]``, where a token may be replaced.
        rate: highest probability of a replacement.
        vocabulary: ids ``[V']`` to draw from.
        generator: CPU generator.
        units: ``[N]``, below N: rows with the same number are corrupted alike, position by position.

    Returns:
        ``[N, T]`` on the device of `input_ids`.
    """
    hit = _hit(allowed, rate, generator, units)
    drawn = _alike(vocabulary.cpu()[torch.randint(len(vocabulary), input_ids.shape, generator=generator)], units)
    return torch.where(hit, drawn.to(input_ids), input_ids)


def drop_attention(allowed: Tensor, rate: float, generator: torch.Generator, units: Tensor | None = None) -> Tensor:
    """Make tokens invisible to all others; each row's share is itself uniform between 0 and `rate`.

    Args:
        allowed: bool ``[N, T]``, which tokens may become invisible.
        rate, generator, units: as for `random_tokens`.

    Returns:
        bool ``[N, T]``, False where no other token may attend to this one; on the device of `allowed`.
    """
    return ~_hit(allowed, rate, generator, units)


def allowed_positions(batch: Batch, vocabulary: Tensor) -> Tensor:
    """Where a batch may be corrupted, bool ``[N, T]``.

    Never at a position that is read out (nor behind the last one of a row, which is padding), never padding, never a
    token outside `vocabulary`, and never the first of a text: under a causal mask it is all that the next ones can see.
    """
    ids = batch.input_ids
    place = torch.arange(ids.shape[1], device=ids.device)
    depth = place if batch.position_ids is None else batch.position_ids
    allowed = torch.isin(ids, vocabulary.to(ids.device)) & (depth > 0)
    if batch.attention_mask is not None:
        # Decoders that classify read the last token.
        last = batch.attention_mask.sum(1, keepdim=True) - 1
        allowed &= batch.attention_mask.bool() & (place != last)
    if batch.positions is not None:
        read = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
        read = read.index_fill(0, batch.positions, True).view_as(ids)
        # Padding of causal rows has no mask; it lies behind all that is read out.
        allowed &= ~read & read.flip(1).cumsum(1).flip(1).bool()
    return allowed


def corrupt(
    batch: Batch,
    kind: Literal["tokens", "attention"],
    rate: float,
    vocabulary: Tensor,
    generator: torch.Generator,
) -> tuple[Batch, Tensor | None]:
    """A corrupted copy of a batch.

    The rate of each row is uniform between 0 and `rate`. Rows that hold parts of one example (`Batch.units`) are
    corrupted alike, position by position: its choices are compared behind the same prompt. A prefix that examples share
    in a packed row is corrupted once. Tokens that are read out stay, so of language modelling only prompts change.

    Args:
        batch: not modified; its other fields are shared with the copy.
        kind: replace tokens, or make them invisible.
        rate: highest share of tokens, 0 to 1.
        vocabulary: ids ``[V']`` of ordinary tokens (`ordinary_tokens`): no others are touched or drawn.
        generator: CPU generator; the copy depends on its state and the batch only.

    Returns:
        The batch, and for attention the visibility ``[N, T]`` (bool; see `drop_attention`). It is already in
        `attention_mask` where the batch has one; else the model's mask has to apply it, leaving each token visible to
        itself. For tokens None.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("tokens", "attention"):
        raise ValueError(f"expected tokens or attention, found {kind!r}")
    allowed = allowed_positions(batch, vocabulary)
    if kind == "tokens":
        replaced = random_tokens(batch.input_ids, allowed, rate, vocabulary, generator, batch.units)
        return replace(batch, input_ids=replaced), None
    visible = drop_attention(allowed, rate, generator, batch.units)
    if batch.attention_mask is None:
        return batch, visible
    return replace(batch, attention_mask=batch.attention_mask * visible), visible


def unlabelled(task: Task, file: str | Path) -> Encoded:
    """Inputs from a file, in the task's prompt: JSONL rows as in training, whose labels do not matter, or plain text.

    Raises:
        UserError: no such file, a row that breaks the schema, plain text for multiple choice.
    """
    path, dataset = Path(file), task.dataset
    if path.suffix == ".jsonl" or dataset.kind == "multiple_choice" or not is_file(path):
        rows = read_rows(path, dataset.kind, dataset.labels, require_labels=False)
    else:
        lines = [line.strip() for line in read_text(path).splitlines()]
        rows = [Row(str(number), text=line) for number, line in enumerate(lines, 1) if line]
        if not rows:
            raise UserError(f"{path}: expected lines of text, found an empty file")
    return task.encode_rows(rows, path.name, labelled=False)


def _hit(allowed: Tensor, rate: float, generator: torch.Generator, units: Tensor | None) -> Tensor:
    """Which tokens are corrupted, bool ``[N, T]`` on the device of `allowed`."""
    shares = rate * torch.rand(len(allowed), 1, generator=generator)
    hit = torch.rand(allowed.shape, generator=generator) < shares
    return allowed & _alike(hit, units).to(allowed.device)


def _alike(drawn: Tensor, units: Tensor | None) -> Tensor:
    """The draw of each row's unit."""
    return drawn if units is None else drawn[units.cpu()]
