"""Plain causal rows reach attention without a mask, also where transformers makes one while it is traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.masking_utils
from tiny import lora_config, random_points, tiny

from loracurve.batching import Batch
from loracurve.model import CurveModel, CurveSpec


def build(kind: str) -> CurveModel:
    model = CurveModel(tiny(kind), lora_config(kind), CurveSpec(1, 2)).eval()
    model.set_curve(model.spec, random_points(model))
    assert model.supports_trees
    return model


def batch(**more: Any) -> Batch:
    ids = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    count = torch.arange(2)
    return Batch(ids, "answer", count, count, count, positions=count * 6 + 5, answer_ids=torch.tensor([5, 6]), **more)


def masks_seen(model: CurveModel, of: Batch) -> tuple[torch.Tensor, list[bool]]:
    """Scores at two points, and whether each attention got a mask."""
    seen: list[bool] = []
    handles = [
        m.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["attention_mask"] is not None), with_kwargs=True
        )
        for n, m in model.model.named_modules()
        if n.endswith("self_attn")
    ]
    with torch.no_grad():
        scores = model.scores(of, model.coefficients(torch.tensor([0.2, 0.7], dtype=torch.float64)))
    for handle in handles:
        handle.remove()
    assert seen
    return scores, seen


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_plain_rows_need_no_mask_where_transformers_makes_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    expected, seen = masks_seen(model, batch())
    assert not any(seen)
    monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda *_: True)
    model.plain_causal.possible = False
    explicit, seen = masks_seen(model, batch())
    model.plain_causal.possible = True
    if not all(seen):
        pytest.skip("this transformers makes no mask while traced")
    found, seen = masks_seen(model, batch())
    assert not any(seen)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(explicit, expected)


def test_masks_that_say_more_than_causal_stay() -> None:
    model = build("llama")
    visible = torch.ones(2, 6, dtype=torch.bool)
    visible[:, 2] = False
    scores, seen = masks_seen(model, batch(visible=visible))
    assert all(seen)
    assert not torch.allclose(scores, masks_seen(model, batch())[0])
    packed = batch(ends=torch.tensor([[6, 6, 4, 4, 6, 6]] * 2), position_ids=torch.tensor([[0, 1, 2, 3, 2, 3]] * 2))
    assert all(masks_seen(model, packed)[1])


@pytest.mark.parametrize(("option", "value"), [("sliding_window", 4), ("layer_types", ["sliding_attention"] * 3)])
def test_sliding_windows_keep_their_masks(option: str, value: Any) -> None:
    base = tiny("llama")
    assert build("llama").plain_causal.possible
    setattr(base.config, option, value)
    assert not CurveModel(base, lora_config("llama"), CurveSpec(1, 2)).plain_causal.possible
