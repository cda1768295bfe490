"""Training takes no attention kernel whose gradients are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.made import shared_points
from helpers.matrix import QUIET, build
from helpers.settings import LOOP, posterior_setting
from helpers.tiny import lora_config, random_points, tiny
from helpers.trainers import arguments, rows
from torch.nn import functional as F

from loracurve.baselines.swag import SWAG
from loracurve.curve.spec import CurveSpec
from loracurve.model.attention import without_cudnn_attention
from loracurve.model.curve_model import CurveModel
from loracurve.training.config import PerturbationConfig
from loracurve.training.fit import fit, fit_anchors
from loracurve.training.trainer import CurveTrainer


def _anchors(folder: Path) -> None:
    model, _, task = build("encoder", folder, CurveSpec.slots(2), r=2)
    fit_anchors(model, task, LOOP, progress=False)


def _curve(folder: Path, **options: object) -> None:
    model, _, task = build("encoder", folder, CurveSpec(1, 2), r=2)
    fit(model, task, shared_points(steps=2, batch_size=4, **options), **QUIET)


def _checkpointing(folder: Path) -> None:
    _curve(folder, gradient_checkpointing=True)


def _sam(folder: Path) -> None:
    _curve(folder, perturbation=PerturbationConfig("sam"), points=1)


def _one_adapter(folder: Path) -> None:
    SWAG(rank=2, collect=2).fit(posterior_setting(folder))


def _trainer(folder: Path) -> None:
    model = CurveModel(tiny("qwen2"), lora_config("qwen2"), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    sets = {"train_dataset": rows(8), "eval_dataset": rows(5)}
    CurveTrainer(model, arguments(folder, max_steps=2, eval_strategy="steps", eval_steps=1), **sets).train()


@pytest.mark.parametrize("way", [_anchors, _curve, _checkpointing, _sam, _one_adapter, _trainer])
def test_no_training_asks_cudnn_for_gradients_and_all_else_may(
    way: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: dict[bool, set[bool]] = {True: set(), False: set()}
    real = F.scaled_dot_product_attention

    def attention(*args: object, **options: object) -> torch.Tensor:
        allowed[torch.is_grad_enabled()].add(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    way(tmp_path)
    assert allowed[True] == {False} and True in allowed[False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_what_was_forbidden_before_stays_so() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for allowed in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(allowed)
            with pytest.raises(ZeroDivisionError), without_cudnn_attention():
                assert not torch.backends.cuda.cudnn_sdp_enabled()
                raise ZeroDivisionError
            assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [64, 96, 128, 192])
def test_gradients_of_low_scores_are_those_of_the_formula(length: int) -> None:
    """A padded text of these lengths whose scores are all near -120, in bfloat16, against float64."""
    draw = torch.Generator().manual_seed(0)
    size = (2, 3, length, 32)
    q, k, v = (torch.randn(size, generator=draw) * scale for scale in (0.1, 0.1, 1.0))
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(size[-1])
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
    mask[1, ..., length // 2 :] = False
    found, expected = [], []
    for out, dtype in ((found, torch.bfloat16), (expected, torch.float64)):
        leaves = [x.to(torch.bfloat16).cuda().to(dtype).requires_grad_() for x in (q, k, v)]
        with without_cudnn_attention():
            F.scaled_dot_product_attention(*leaves, attn_mask=mask.cuda()).square().sum().backward()
        out += [x.grad.double() for x in leaves if x.grad is not None]
    for name, one, other in zip("qkv", found, expected, strict=True):
        assert one.isfinite().all(), name
        assert (one - other).norm() <= 0.05 * other.norm(), name
