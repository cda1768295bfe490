"""Corrupted inputs: what is replaced, what stays, and what has no influence."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import matrix
from helpers.made import made_task
from helpers.matrix import SCORING, build
from helpers.tiny import random_points

from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.system.randomness import generator
from loracurve.tasks.batching import Batch, collate
from loracurve.training.corruption import allowed_positions, corrupt, drop_attention, ordinary_tokens, random_tokens

LAYOUTS = [("qwen2", "letter"), ("llama", "text"), ("qwen2", "lm"), ("encoder", "head")]


def same_but(first: Batch, second: Batch, *names: str) -> bool:
    pairs = [(getattr(first, f.name), getattr(second, f.name)) for f in fields(Batch) if f.name not in names]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_share_of_replaced_tokens_is_uniform_in_each_row():
    ids, vocabulary = torch.zeros(4000, 200, dtype=torch.long), torch.arange(10, 60)
    allowed = torch.ones_like(ids, dtype=torch.bool)
    allowed[:, :100] = False
    replaced = random_tokens(ids, allowed, 0.4, vocabulary, generator(0))
    assert (replaced[:, :100] == 0).all()
    share = (replaced[:, 100:] != 0).double().mean(1)
    # A uniform share in [0, 0.4] plus binomial noise of at most sqrt(0.24 / 100).
    assert share.mean().item() == pytest.approx(0.2, abs=0.01)
    assert share.var().item() == pytest.approx(0.4**2 / 12 + (0.2 - 0.4**2 / 3) / 100, rel=0.1)
    drawn = torch.bincount(replaced[replaced != 0], minlength=60)
    assert (drawn[:10] == 0).all()
    expected = drawn.sum() / 50
    assert ((drawn[10:] - expected).square() / expected).sum() < 86.7  # chi-squared, 49 degrees, 0.999 quantile


def test_share_of_dropped_tokens():
    visible = drop_attention(torch.ones(4000, 100, dtype=torch.bool), 0.4, generator(1))
    assert (~visible).double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert drop_attention(torch.ones(3, 4, dtype=torch.bool), 0.0, generator(1)).all()
    assert drop_attention(torch.zeros(3, 4, dtype=torch.bool), 1.0, generator(1)).all()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("architecture,scoring", LAYOUTS)
def test_read_outs_padding_and_special_tokens_stay(
    architecture: str, scoring: str, packing: bool, tmp_path: Path
) -> None:
    task = made_task(tmp_path, architecture, scoring)
    vocabulary = ordinary_tokens(task.tokenizer)
    encoded = task.encode("test")
    batch = collate(encoded, list(range(9)), row_tokens=60, packing=packing, pad_to=32)
    before = {f.name: v.clone() for f in fields(Batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)}
    touched = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    hidden = torch.zeros_like(touched)
    for seed in range(60):
        copy, none = corrupt(batch, "tokens", 1.0, vocabulary, generator(seed))
        assert none is None and same_but(batch, copy, "input_ids")
        changed = copy.input_ids != batch.input_ids
        assert torch.isin(copy.input_ids[changed], vocabulary).all()
        touched |= changed
        masked, visible = corrupt(batch, "attention", 1.0, vocabulary, generator(seed))
        assert same_but(batch, masked, "attention_mask")
        if batch.attention_mask is not None:
            assert torch.equal(masked.attention_mask, batch.attention_mask * visible)
        hidden |= ~visible
    assert all(torch.equal(getattr(batch, name), tensor) for name, tensor in before.items()), "the batch is a copy"
    assert torch.equal(touched, hidden) and torch.equal(touched, allowed_positions(batch, vocabulary))
    assert touched.any(1).all(), "every row has something to corrupt"
    assert not torch.isin(batch.input_ids[touched], torch.tensor(task.tokenizer.all_special_ids)).any()
    assert not touched[:, 0].any()
    if batch.positions is not None:
        assert not touched.flatten()[batch.positions].any()
    if scoring == "head":
        assert not touched[batch.attention_mask == 0].any()
    elif not packing:
        lengths = [
            len(e.prompt) + len(c) - 1 for e in (encoded.examples[i] for i in range(9)) for c in e.choices or "0"
        ]
        for row, length in zip(touched, lengths, strict=True):
            assert not row[length:].any(), "padding"
    if batch.ends is not None:
        assert not touched[batch.position_ids == 0].any(), "padding, and first tokens"


def test_rows_of_one_example_are_corrupted_alike(tmp_path: Path) -> None:
    task = made_task(tmp_path, "qwen2", "text")
    encoded = task.encode("test")
    batch = collate(encoded, [3, 4, 5], packing=False)
    vocabulary = ordinary_tokens(task.tokenizer)
    copy, _ = corrupt(batch, "tokens", 1.0, vocabulary, generator(0))
    _, visible = corrupt(batch, "attention", 1.0, vocabulary, generator(0))
    assert (copy.input_ids != batch.input_ids).any() and not visible.all()
    for unit in range(3):
        rows = (batch.units == unit).nonzero().flatten()
        prompt = len(encoded.examples[3 + unit].prompt)
        for row in rows[1:]:
            assert torch.equal(copy.input_ids[rows[0], :prompt], copy.input_ids[row, :prompt])
            assert torch.equal(visible[rows[0], :prompt], visible[row, :prompt])


def test_a_draw_is_a_function_of_its_generator(tmp_path: Path) -> None:
    task = made_task(tmp_path, "qwen2", "letter")
    batch = collate(task.encode("test"), list(range(6)))
    vocabulary = ordinary_tokens(task.tokenizer)
    first, again, other = (corrupt(batch, "tokens", 0.5, vocabulary, generator(s))[0].input_ids for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="tokens or attention"):
        corrupt(batch, "noise", 0.5, vocabulary, generator(0))  # type: ignore[arg-type]


@matrix.architectures
def test_ordinary_tokens_are_all_but_special_ones(architecture: str, tmp_path: Path) -> None:
    tokenizer = made_task(tmp_path, architecture, "head" if architecture == "encoder" else "letter").tokenizer
    ordinary = ordinary_tokens(tokenizer)
    assert len(ordinary) == len(tokenizer) - len(set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder))
    assert not set(ordinary.tolist()) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("architecture", "scoring"), SCORING.items())
def test_what_is_invisible_has_no_influence(architecture: str, scoring: str, packing: bool, tmp_path: Path) -> None:
    model, _, task = build(architecture, tmp_path, CurveSpec(1, 2))
    model.set_curve(model.spec, random_points(model))
    model.eval()
    batch = collate(task.encode("train"), range(6), packing=packing)
    corrupted = _corrupted(model, task, batch)
    hidden = (
        ~corrupted.visible
        if corrupted.attention_mask is None
        else (batch.attention_mask - corrupted.attention_mask).bool()
    )
    assert hidden.any()
    c = model.coefficients(torch.tensor([0.2, 0.9]))
    found = model.runner.scores(corrupted, c)
    assert not torch.allclose(found, model.runner.scores(batch, c), atol=1e-4), "but to be there mattered"
    ids = torch.where(hidden, torch.full_like(batch.input_ids, 7), batch.input_ids)
    torch.testing.assert_close(model.runner.scores(replace(corrupted, input_ids=ids), c), found)


def _corrupted(model: CurveModel, task: Any, batch: Any) -> Any:
    from loracurve.system.randomness import generator
    from loracurve.training.corruption import corrupt

    copy, visible = corrupt(batch, "attention", 0.8, ordinary_tokens(task.tokenizer), generator(1))
    return copy if copy.attention_mask is not None else replace(copy, visible=visible)
