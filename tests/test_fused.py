"""What runs in fewer kernels gives what many gave: norms as written, factors cast layer by layer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from made import made_task, vocabulary
from tiny import lora_config, random_points, tiny
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from loracurve.curve.spec import CurveSpec
from loracurve.model.cuda_graphs import map_tensors
from loracurve.model.curve_model import CurveModel
from loracurve.model.functional import cast_together, grouped_linear
from loracurve.model.fused_norms import as_written, fuse_norms, fused_norm
from loracurve.tasks.batching import collate


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# ---- norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


# ---- factors


def test_gradients_through_a_common_cast_are_those_of_each_cast() -> None:
    leaves = [drawn(3, 4, 5).requires_grad_(), drawn(3, 4, 7).requires_grad_(), drawn(2, 2).requires_grad_()]
    copies = cast_together(leaves, torch.bfloat16)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, leaves, strict=True))
    loss = (copies[0].float() ** 2).sum() + copies[1].mT.float().cumsum(1).sum()  # the third is not read
    loss.backward()
    expected = [p.detach().clone().requires_grad_() for p in leaves]
    (expected[0].bfloat16().float() ** 2).sum().backward()
    expected[1].bfloat16().mT.float().cumsum(1).sum().backward()
    assert leaves[2].grad is None
    for p, q in zip(leaves[:2], expected[:2], strict=True):
        assert p.grad is not None and torch.equal(p.grad, q.grad) and p.grad.is_contiguous()  # type: ignore[arg-type]


def test_a_grouped_map_and_its_gradients_are_those_of_products() -> None:
    x, a = drawn(3, 6, 5).double().requires_grad_(), drawn(3, 2, 5).double().requires_grad_()
    assert torch.equal(grouped_linear(x, a), torch.bmm(x, a.mT))
    assert torch.autograd.gradcheck(grouped_linear, (x, a))
    assert torch.autograd.gradgradcheck(grouped_linear, (x, a))
    grouped_linear(x, a.detach()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", ["rows", "windows", "slots"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_layers_take_the_common_cast_and_nothing_changes(architecture: str, kind: str, tmp_path: Path) -> None:
    task = made_task(tmp_path, architecture, "letter")
    base = tiny(architecture, torch.bfloat16, vocabulary(task), labels=2)
    spec = CurveSpec.slots(2) if kind == "slots" else CurveSpec(2, 2) if kind == "windows" else CurveSpec(1, 2)
    model = CurveModel(base, lora_config(architecture), spec)
    model.set_curve(spec, random_points(model))
    encoded = task.encode("train")
    batch = collate(encoded, range(4), 1)
    if kind == "slots":
        batch.row_slots = torch.tensor([0, 0, 1, 1])
        coefficients = torch.eye(2)
    else:
        coefficients = model.coefficients(torch.linspace(0.05, 0.95, 4, dtype=torch.float64))[None]
    arranged, layout = model.arrange(batch, coefficients)
    assert (layout.kind, layout.whole) == (("points", True) if kind == "slots" else ("rows", False))
    assert layout.windows == (2 if kind == "windows" else 1)

    def gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        for p in model.factors:
            p.grad = None
        scores = model.scores(map_tensors(batch, lambda x: x), arranged, layout)
        scores.log_softmax(-1).sum().backward()
        return scores.detach(), [p.grad.clone() for p in model.factors if p.grad is not None]

    once = gradients()
    layer = next(iter(model.layers.values()))
    assert layer.cast is not None and layer.cast[0].dtype == torch.bfloat16
    assert next(iter(copy.deepcopy(model).layers.values())).cast is None
    model._cast_factors = lambda: None  # type: ignore[method-assign]
    each = gradients()
    assert layer.cast is None  # that of the pass before is gone
    assert torch.equal(once[0], each[0]) and len(once[1]) == len(each[1]) > 0
    for mine, other in zip(once[1], each[1], strict=True):
        assert torch.equal(mine, other)
    with torch.no_grad():
        del model._cast_factors
        assert torch.equal(model.scores(batch, arranged, layout), once[0]) and layer.cast is None
