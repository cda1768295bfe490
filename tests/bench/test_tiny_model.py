"""The tiny model of the smoke suite."""

from __future__ import annotations

import torch

from loracurve.bench.tiny_model import tiny_model


def test_the_tiny_model_is_always_the_same_and_answers_with_single_tokens() -> None:
    (first, tokenizer), (second, _) = tiny_model(), tiny_model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for word in (" A", " Z", " negative", " positive", " no"):
        assert len(tokenizer(word)["input_ids"]) == 1
