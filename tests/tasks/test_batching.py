"""Layouts of batches: whatever is packed behind a mask must score as if it stood alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import matrix
from helpers.made import made_task, vocabulary
from helpers.tiny import lora_config, random_points, tiny

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict
from loracurve.model.curve_model import CurveModel
from loracurve.tasks.batching import _padded, collate, evaluation_batches, tree_mask
from loracurve.tasks.task import Task

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)


def build(architecture: str, scoring: str, folder: Path) -> tuple[CurveModel, Task]:
    task = made_task(folder, architecture, scoring)
    model = CurveModel(tiny(architecture, torch.float64, vocabulary(task)), lora_config(architecture), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    return model, task


def test_tree_mask_lets_tokens_see_their_ancestors_only() -> None:
    # prefix 0 1, branch 2 3, branch 4, padding 5
    mask = tree_mask(torch.tensor([[5, 5, 4, 4, 5, 6]]), torch.float32)[0, 0] == 0
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert mask.int().tolist() == expected


@pytest.mark.parametrize("scoring", ["letter", "text", "lm"])
@matrix.decoders
def test_packed_rows_score_like_single_examples(architecture: str, scoring: str, tmp_path: Path) -> None:
    model, task = build(architecture, scoring, tmp_path)
    encoded = task.encode("test")
    assert model.runner.takes_trees(encoded)
    if scoring == "text":
        encoded = replace(encoded, normalise="mean")
    alone = predict(model, (collate(encoded, [i], packing=False) for i in range(len(encoded))), T)
    for row_tokens in (1, 60, 10_000):
        batches = list(evaluation_batches(encoded, tokens_per_batch=400, row_tokens=row_tokens))
        packed = predict(model, batches, T)
        torch.testing.assert_close(packed.point_log_probs, alone.point_log_probs, rtol=1e-6, atol=1e-6)
    rows = {len(b.input_ids) for b in evaluation_batches(encoded, row_tokens=10_000, tokens_per_batch=10**6)}
    assert rows == {1}, "everything fits into one row"


@pytest.mark.parametrize("scoring", ["letter", "text", "lm"])
@matrix.decoders
def test_examples_of_packed_rows_have_points_of_their_own(architecture: str, scoring: str, tmp_path: Path) -> None:
    model, task = build(architecture, scoring, tmp_path)
    encoded, numbers = task.encode("test"), [4, 0, 3, 1, 2]
    c = model.coefficients(torch.rand(2, len(numbers), generator=torch.Generator().manual_seed(1)).double())

    def gradients(scores: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(torch.autograd.grad(sum(s.clamp(min=-1e3).square().sum() for s in scores), model.factors))

    alone = [
        model.runner.scores(collate(encoded, [i], packing=False), c[:, e : e + 1].expand(-1, rows, -1))
        for e, i in enumerate(numbers)
        for rows in [len(collate(encoded, [i], packing=False).input_ids)]
    ]
    expected, per_factor = torch.cat(alone, dim=1), gradients(alone)
    for rows in (1, 2):
        batch = collate(encoded, numbers, rows=rows, own_points=True)
        assert len(batch.input_ids) == rows and batch.token_units is not None
        assert batch.token_units.unique().tolist() == [0, 1, 2, 3, 4]
        found = model.runner.scores(batch, c)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for got, wanted in zip(gradients([found]), per_factor, strict=True):
            # Rotary embeddings and norms of these models run in float32.
            assert (got - wanted).norm() < 1e-6 * wanted.norm()
    single = collate(encoded, numbers, row_tokens=1, own_points=True)
    assert single.token_units is None and len(single.input_ids) == len(numbers)


def test_packing_stores_a_shared_prefix_once(tmp_path: Path) -> None:
    encoded = made_task(tmp_path, "qwen2", "text").encode("test")
    numbers = list(range(len(encoded)))
    packed = collate(encoded, numbers, row_tokens=10_000)
    apart = collate(encoded, numbers, packing=False)
    assert packed.input_ids.shape[0] == 1
    assert packed.tokens < 0.6 * apart.tokens


def test_no_example_is_dropped_for_any_budget(tmp_path: Path) -> None:
    encoded = made_task(tmp_path, "llama", "letter").encode("train")
    for budget in (1, 37, 500):
        seen = torch.cat([b.index for b in evaluation_batches(encoded, budget)])
        assert sorted(seen.tolist()) == list(range(len(encoded)))


def test_missing_choices_have_no_probability(tmp_path: Path) -> None:
    for scoring in ("letter", "text"):
        task = made_task(tmp_path / scoring, "qwen2", scoring)
        model = CurveModel(tiny("qwen2", vocabulary=vocabulary(task)), lora_config("qwen2"))
        encoded = task.encode("test")
        predictive = predict(model, evaluation_batches(encoded), T)
        counts = torch.tensor([e.n_choices for e in encoded.examples])
        assert set(counts.tolist()) == {2, 3}
        assert (predictive.probs[counts == 2, 2] == 0).all()
        assert (predictive.probs[counts == 3, 2] > 0).all()


def test_rows_of_one_example_share_a_unit_where_choices_cannot_be_packed(tmp_path: Path) -> None:
    encoded = made_task(tmp_path, "qwen2", "text").encode("test")
    batch = collate(encoded, [3, 4, 5], packing=False)
    assert batch.units is not None
    assert torch.bincount(batch.units).tolist() == [encoded.examples[i].n_choices for i in (3, 4, 5)]


@pytest.mark.parametrize("scoring", ["text", "letter"])
def test_few_shapes_fill_equal_rows_for_each_slot(tmp_path: Path, scoring: str) -> None:
    encoded = made_task(tmp_path, "qwen2", scoring).encode("train")
    numbers, slots = list(range(24)), [m for m in range(3) for _ in range(8)]
    rows = 3
    batch = collate(encoded, numbers, 128, slots=slots, pad_to=32, rows=rows)
    assert batch.row_slots is not None and batch.slots is not None and batch.ends is not None
    assert torch.bincount(batch.row_slots).tolist() == [rows] * 3
    assert batch.slots.tolist() == slots and batch.index.tolist() == numbers
    assert batch.input_ids.shape[1] % 32 == 0
    model = CurveModel(tiny("qwen2", torch.float64, 600), lora_config("qwen2"), CurveSpec.slots(3))
    model.set_curve(model.spec, random_points(model))
    alone = collate(encoded, numbers, 1, slots=slots)
    eye = torch.eye(3, dtype=torch.float64)
    assert model.runner.arrange(batch, eye)[1].kind == "points"
    with torch.inference_mode():
        torch.testing.assert_close(
            model.runner.scores(batch, eye), model.runner.scores(alone, eye), rtol=1e-6, atol=1e-6
        )


def test_padded_sizes_are_few() -> None:
    assert [_padded(s, 1) for s in (1, 13, 1000)] == [1, 13, 1000]
    assert [_padded(s, 32) for s in (1, 32, 200, 256, 257, 513, 1000, 1025)] == [32, 32, 224, 256, 320, 640, 1024, 1280]
    sizes = {_padded(s, 32) for s in range(1, 4096)}
    assert len(sizes) <= 32 and all(_padded(s, 32) < max(1.25 * s, s + 32) + 1 for s in range(1, 4096))
