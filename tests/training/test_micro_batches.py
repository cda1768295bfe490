"""How a training batch is laid out."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch

from loracurve.tasks.encoding import Encoded, Example
from loracurve.training.config import FitConfig
from loracurve.training.micro_batches import CAPTURED_LENGTHS, training_batch

# What decides on the layout; no step is run.
CAPTURING: Any = SimpleNamespace(
    device=torch.device("cuda"), runner=SimpleNamespace(takes_trees=lambda encoded, row_tokens: True)
)


def texts(sizes: list[int]) -> Encoded:
    examples = [Example(str(i), (100 + i,) * n, (), 0, 2) for i, n in enumerate(sizes)]
    return Encoded(examples, "answer", (1, 2), ("a", "b"), "sum", 0)


def test_examples_with_points_of_their_own_share_captured_rows_of_few_shapes() -> None:
    draw = random.Random(0)
    encoded = texts([round(min(max(draw.lognormvariate(3, 0.5), 5), 60)) for _ in range(2000)])
    config = FitConfig(batch_size=32, points=2)
    shapes, packed, apart = set(), 0, 0
    for step in range(50):
        numbers = draw.sample(range(2000), 32)
        batch = training_batch(CAPTURING, encoded, numbers, config)
        rows, length = batch.input_ids.shape
        assert batch.token_units is not None and batch.ends is not None
        # Every token belongs to its example, whatever row that lies in; padding to any.
        sizes = torch.bincount(batch.token_units[batch.input_ids > 0], minlength=32)
        assert sizes.tolist() == [encoded.sizes[i] for i in numbers]
        shapes.add((rows, length))
        packed += rows * length
        longest = max(encoded.sizes[i] for i in numbers)
        apart += 32 * -(-longest // CAPTURED_LENGTHS) * CAPTURED_LENGTHS
        if not step:
            again = training_batch(CAPTURING, encoded, numbers, FitConfig(batch_size=32, share_points=True))
            assert again.token_units is None
    assert packed < 0.6 * apart
    assert len(shapes) <= 3 and len({rows for rows, _ in shapes}) == 1


def test_examples_of_one_length_keep_rows_of_their_own_in_their_order() -> None:
    encoded = texts([20] * 16)
    numbers = [3, 1, 2, 0, 5, 4, 7, 6]
    for own in (True, False):
        batch = training_batch(CAPTURING, encoded, numbers, FitConfig(batch_size=8, share_points=not own))
        assert batch.token_units is None and batch.rows.tolist() == list(range(8))
        assert batch.input_ids.shape == (8, CAPTURED_LENGTHS)
    # Nor may fewer examples than were counted on change places: their points come in the examples' order.
    varied = texts([5, 90, *[10] * 14])
    batch = training_batch(CAPTURING, varied, [0, 1], FitConfig(batch_size=16, row_tokens=100))
    assert batch.token_units is None and batch.rows.tolist() == [0, 1]
