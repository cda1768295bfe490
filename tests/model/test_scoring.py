"""Which models can score packed rows."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import tiny

from loracurve.model.scoring import takes_tree_masks


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("ignores", [False, True])
def test_packing_is_refused_to_models_without_the_mask_and_not_for_rounding(noise: float, ignores: bool) -> None:
    """In half precision a deep model differs from itself by kernels: here by noise of 5 % of a logit's deviation."""
    base = tiny("qwen2", torch.bfloat16).eval()
    draw = torch.Generator().manual_seed(0)

    def disturb(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + (noise * output.float().std() * torch.randn(output.shape, generator=draw)).to(output)

    base.lm_head.register_forward_hook(disturb)
    if ignores:
        for layer in base.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
            )
    with torch.no_grad():
        assert takes_tree_masks(base, torch.bfloat16, torch.device("cpu")) is not ignores
