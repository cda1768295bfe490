"""Plain causal rows reach attention without a mask, also where transformers makes one while it is traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import lora_config, random_points, tiny

from loracurve.curve.spec import CurveSpec
from loracurve.model import causal_mask
from loracurve.model.curve_model import CurveModel
from loracurve.tasks.batching import Batch


def build(kind: str) -> CurveModel:
    model = CurveModel(tiny(kind), lora_config(kind), CurveSpec(1, 2)).eval()
    model.set_curve(model.spec, random_points(model))
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
        scores = model.runner.scores(of, model.coefficients(torch.tensor([0.2, 0.7], dtype=torch.float64)))
    for handle in handles:
        handle.remove()
    assert seen
    return scores, seen


def explicit_masks(model: CurveModel) -> None:
    """Let the decoder layers get the causal mask that an older transformers makes while a graph is captured."""

    def hook(_: Any, args: Any, kwargs: Any) -> Any:
        if not causal_mask.capturing() or kwargs["attention_mask"] is not None:
            return None
        rows, size = args[0].shape[:2]
        mask = torch.ones(size, size, dtype=torch.bool).tril().expand(rows, 1, size, size)
        return args, kwargs | {"attention_mask": mask}

    for layer in model.model.get_decoder().layers:
        layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_plain_rows_keep_coming_without_a_mask_while_captured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    explicit_masks(model)
    expected, seen = masks_seen(model, batch())
    assert not any(seen)
    monkeypatch.setattr(causal_mask, "capturing", lambda: True)
    found, seen = masks_seen(model, batch())
    assert not any(seen)
    torch.testing.assert_close(found, expected)
    model.runner.plain_causal.had_none.clear()  # rows never seen before: the mask stays, and says the same
    found, seen = masks_seen(model, batch())
    assert all(seen)
    torch.testing.assert_close(found, expected)


def test_masks_that_say_more_than_causal_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    plain = masks_seen(model, batch())[0]
    visible = torch.ones(2, 6, dtype=torch.bool)
    visible[:, 2] = False
    packed = batch(ends=torch.tensor([[6, 6, 4, 4, 6, 6]] * 2), position_ids=torch.tensor([[0, 1, 2, 3, 2, 3]] * 2))
    for masked in (batch(visible=visible), packed):
        expected, seen = masks_seen(model, masked)
        assert all(seen)
        assert not torch.allclose(expected, plain)
        with monkeypatch.context() as patch:
            patch.setattr(causal_mask, "capturing", lambda: True)
            found, seen = masks_seen(model, masked)
        assert all(seen)
        torch.testing.assert_close(found, expected)
