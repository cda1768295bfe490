"""Parts in fewer kernels give what they gave as written."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
from typing import Any

import pytest
import torch
from helpers import matrix
from helpers.tiny import curve_model, inputs, tiny
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, GlmConfig, GlmForCausalLM, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from loracurve.model import kernels
from loracurve.model.functional import mixing
from loracurve.model.fused_parts import as_written, fuse_parts, fused_norm, gate, turn
from loracurve.model.routes import Route


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
    assert fuse_parts(holder)["norm"] == 1 and not any(fuse_parts(holder).values())  # once
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

    assert not any(fuse_parts(nn.ModuleList([other, OddRMSNorm(), LlamaRMSNorm(8).to("meta")])).values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@matrix.dtypes
def test_the_kernel_runs_on_a_gpu_unless_it_may_not(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(64, eps=1e-5).to("cuda", dtype)
    norm.weight.data = drawn(64, dtype=dtype).cuda()
    x = drawn(7, 64, dtype=dtype).cuda()
    written = norm(x)
    assert fuse_parts(nn.ModuleList([norm]))["norm"] == 1
    with as_written():
        assert torch.equal(norm(x), written)
    assert torch.equal(norm(x), fused_norm(x, norm.weight, 1e-5))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(norm(x), written, rtol=tolerance, atol=tolerance)


NEEDS = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels run wherever this is, and say so."""
    seen: list[str] = []
    for name in ("folded", "mixed", "turned", "gated", "gated_gradients"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *args, _k=kernel, _n=name, **more: seen.append(_n) or _k(*args, **more)
        )
    monkeypatch.setattr(kernels, "runs_here", lambda *tensors: tensors[0].dtype != torch.float64)
    return seen


def with_gradients(function: Any, *leaves: torch.Tensor) -> list[torch.Tensor]:
    own = [x.detach().clone().requires_grad_() for x in leaves]
    found = function(*own)
    found = found if isinstance(found, tuple) else (found,)
    loss = sum((f.float() * drawn(*f.shape).to(f.device)).sum() for f in found)
    return [*found, *torch.autograd.grad(loss, own)]


@NEEDS
@matrix.dtypes
@pytest.mark.parametrize("batch", [1, 2])
def test_rotary_embeddings_and_gates_by_kernels_are_those_as_written(dtype: torch.dtype, batch: int) -> None:
    tight = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    q, k = (drawn(2, 7, h, 12, dtype=dtype).to(DEVICE).transpose(1, 2) for h in (5, 1))
    cos, sin = (drawn(batch, 7, 12 + i, dtype=dtype).to(DEVICE)[..., :12] for i in (0, 1))
    wanted = with_gradients(lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), q, k)
    for found, expected in zip(with_gradients(lambda q, k: turn(q, k, cos, sin), q, k), wanted, strict=True):
        torch.testing.assert_close(found, expected, **tight)
    x, y = drawn(3, 5, 700, dtype=dtype).to(DEVICE), drawn(3, 5, 699, dtype=dtype).to(DEVICE)
    y = torch.cat([y, y[..., :1]], -1)
    wanted = with_gradients(lambda x, y: torch.nn.functional.silu(x) * y, x, y)
    for found, expected in zip(with_gradients(gate, x, y), wanted, strict=True):
        torch.testing.assert_close(found, expected, **tight)


@NEEDS
@matrix.dtypes
@pytest.mark.parametrize(("windows", "degree", "size"), [(1, 2, 3), (1, 2, 9), (2, 2, 5)])
def test_mixing_by_a_kernel_is_the_formula(
    dtype: torch.dtype, windows: int, degree: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = mixing(drawn(6, size, dtype=dtype).to(DEVICE), 2.0, windows, degree)
    assert mix.c is not None
    hidden = drawn(windows, 6 // windows * 5, 3 * mix.c.shape[-1] * 4, dtype=dtype).to(DEVICE)
    monkeypatch.setattr(kernels, "runs_here", lambda *tensors: False)
    wanted = mix(hidden, 3)
    monkeypatch.setattr(kernels, "runs_here", lambda *tensors: True)
    tight = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-2}
    torch.testing.assert_close(mix(hidden, 3), wanted, **tight)
    points = drawn(size, 3, 700, dtype=dtype).to(DEVICE)
    grad = mix.windows(points).contiguous()
    found = mix.folded(grad, points.shape)
    # Every point stands in one window, or in two where they meet.
    twice = torch.ones(size, 1, 1).to(points)
    if windows > 1:
        twice[degree:-1:degree] += 1
    torch.testing.assert_close(found, points * twice)


@NEEDS
@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_model_run_by_kernels_gives_what_it_gave(architecture: str, windows: int, running: list[str]) -> None:
    model, _ = curve_model(architecture, 2, torch.float32)
    model.to(DEVICE).train()
    c = model.coefficients(torch.linspace(0.1, 0.9, 4, dtype=torch.float64)).float().to(DEVICE)
    route = Route("rows", c, windows=windows, degree=2, rows=4)

    def run() -> list[torch.Tensor]:
        model.runner.set_route(route)
        out = model.model(input_ids=inputs(4).to(DEVICE), use_cache=False).logits
        return [out, *torch.autograd.grad(out.square().mean(), model.factors)]

    by_kernels = run()
    by_windows = {"folded"} if windows > 1 else set()
    assert set(running) == {"mixed", "turned", "gated", "gated_gradients"} | by_windows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "runs_here", lambda *tensors: False)
        for found, expected in zip(by_kernels, run(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    running.clear()
    with as_written():
        model.runner.set_route(Route("base"))
        model.model(input_ids=inputs(4).to(DEVICE))
    assert not running


def test_parts_that_do_something_else_stay() -> None:
    sizes: Any = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    assert not any(fuse_parts(LlamaMLP(LlamaConfig(**sizes, hidden_act="gelu"))).values())
    assert fuse_parts(LlamaMLP(LlamaConfig(**sizes)))["gate"] == 1
    assert fuse_parts(tiny("llama"))["rotary"] == 3
    # Interleaved pairs, and a rotary embedding of a part of each head.
    for config, kind in ((GlmConfig, GlmForCausalLM), (CohereConfig, CohereForCausalLM)):
        small = config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, pad_token_id=0,
        )  # fmt: skip
        assert fuse_parts(kind(small))["rotary"] == 0
    fused = LlamaMLP(LlamaConfig(**sizes))
    x = drawn(1, 3, 8)
    before = fused(x)
    fuse_parts(fused)
    back = pickle.loads(pickle.dumps(fused))
    assert type(back) is type(fused) and torch.equal(back(x), before)


@pytest.mark.parametrize("works", [True, False])
def test_where_no_kernel_can_be_compiled_there_is_a_word_and_none_runs(
    works: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compiled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not works:
            raise OSError("no C compiler here")
        return torch.nn.functional.silu(x) * y

    monkeypatch.setattr(kernels, "_working", {})
    monkeypatch.setattr(kernels, "gated", compiled)
    for _ in range(2):
        assert kernels._works(torch.device("cpu")) == works
    said = [r.message for r in caplog.records if r.name == "loracurve"]
    assert said == ([] if works else ["running without Triton's kernels: no C compiler here"])
