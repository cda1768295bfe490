"""Norms in fewer kernels give what they gave as written."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import matrix
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from loracurve.model.fused_norms import as_written, fuse_norms, fused_norm


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@matrix.dtypes
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm])
def test_norms_of_the_usual_kind_are_taken_and_do_what_the_kernel_does(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    holder = nn.ModuleList([kind(24, eps=1e-5), nn.LayerNorm(24)])
    holder[0].weight.data = drawn(24)
    holder.to(dtype)
    x = drawn(3, 5, 24, dtype=dtype).requires_grad_()
    before = holder[0](x)
    (gradient,) = torch.autograd.grad(before.float().square().sum(), x)
    assert fuse_norms(holder) == 1 and fuse_norms(holder) == 0  # once
    assert isinstance(holder[0], kind) and [*holder.state_dict()] == ["0.weight", "1.weight", "1.bias"]
    assert torch.equal(holder[0](x), before)  # on a CPU as written
    after = fused_norm(x, holder[0].weight, 1e-5)
    tight = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(after, before, **tight)
    (other,) = torch.autograd.grad(after.float().square().sum(), x)
    torch.testing.assert_close(other, gradient, rtol=tight["rtol"] * 10, atol=tight["atol"] * 10)
    twin = copy.deepcopy(holder)
    twin[0].weight.data.zero_()
    assert not twin[0](x).any() and holder[0](x).any()  # a copy reads its own weight
    back = pickle.loads(pickle.dumps(holder))
    assert type(back[0]) is type(holder[0]) and torch.equal(back[0](x), before)


def test_norms_of_another_kind_stay() -> None:
    other = GemmaRMSNorm(8)
    nn.init.normal_(other.weight)

    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return self.weight * x * gate

    assert fuse_norms(nn.ModuleList([other, OddRMSNorm(), LlamaRMSNorm(8).to("meta")])) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@matrix.dtypes
def test_the_kernel_runs_on_a_gpu_unless_it_may_not(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(64, eps=1e-5).to("cuda", dtype)
    norm.weight.data = drawn(64, dtype=dtype).cuda()
    x = drawn(7, 64, dtype=dtype).cuda()
    written = norm(x)
    assert fuse_norms(nn.ModuleList([norm])) == 1
    with as_written():
        assert torch.equal(norm(x), written)
    assert torch.equal(norm(x), fused_norm(x, norm.weight, 1e-5))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(norm(x), written, rtol=tolerance, atol=tolerance)
