"""Order of the examples and schedules."""

from __future__ import annotations

import pytest

from loracurve.training.config import LoopConfig
from loracurve.training.loop import batch_numbers, learning_rate_factor


def test_every_example_is_seen_in_each_epoch() -> None:
    numbers = [i for step in range(21) for i in batch_numbers(3, step, 14, 4)]
    for epoch in range(6):
        assert sorted(numbers[epoch * 14 : (epoch + 1) * 14]) == list(range(14))
    assert numbers[:14] != numbers[14:28]


def test_schedules_warm_up_and_end_low() -> None:
    for schedule in ("linear", "cosine", "one-cycle"):
        config = LoopConfig(steps=100, warmup=0.1, schedule=schedule)  # type: ignore[arg-type]
        factors = [learning_rate_factor(config, s) for s in range(100)]
        peak = factors.index(max(factors))
        assert max(factors) == pytest.approx(1.0, abs=1e-2) and 9 <= peak <= 10
        assert factors[-1] < 0.02 and factors[0] < 0.11
        assert factors[:peak] == sorted(factors[:peak]) and factors[peak:] == sorted(factors[peak:], reverse=True)
