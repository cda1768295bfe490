"""The curve layers: shared products, dropout, casts, chosen logits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import matrix
from helpers.made import made_task, vocabulary
from helpers.tiny import (
    RELATIVE,
    T,
    adapters_on,
    curve_model,
    inputs,
    lora_config,
    peft_twin,
    random_points,
    relative_error,
    tiny,
)

from loracurve.curve.spec import CurveSpec
from loracurve.model.cuda_graphs import map_tensors
from loracurve.model.curve_model import CurveModel
from loracurve.model.layers import CurveLinear
from loracurve.model.routes import Route
from loracurve.tasks.batching import collate


@pytest.mark.parametrize("kind", ["rows", "windows", "slots"])
@matrix.decoders
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
    arranged, layout = model.runner.arrange(batch, coefficients)
    assert (layout.kind, layout.whole) == (("points", True) if kind == "slots" else ("rows", False))
    assert layout.windows == (2 if kind == "windows" else 1)

    def gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        for p in model.factors:
            p.grad = None
        scores = model.runner.scores(map_tensors(batch, lambda x: x), arranged, layout)
        scores.log_softmax(-1).sum().backward()
        return scores.detach(), [p.grad.clone() for p in model.factors if p.grad is not None]

    once = gradients()
    layer = next(iter(model.layers.values()))
    assert layer.cast is not None and layer.cast[0].dtype == torch.bfloat16
    assert next(iter(copy.deepcopy(model).layers.values())).cast is None
    model.runner._cast_factors = lambda: None  # type: ignore[method-assign]
    each = gradients()
    assert layer.cast is None  # that of the pass before is gone
    assert torch.equal(once[0], each[0]) and len(once[1]) == len(each[1]) > 0
    for mine, other in zip(once[1], each[1], strict=True):
        assert torch.equal(mine, other)
    with torch.no_grad():
        del model.runner._cast_factors
        assert torch.equal(model.runner.scores(batch, arranged, layout), once[0]) and layer.cast is None


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of layers that are run together."""
    served: list[int] = []
    together = CurveLinear._together
    monkeypatch.setattr(
        CurveLinear, "_together", lambda self, x, layers: served.append(len(layers)) or together(self, x, layers)
    )
    return served


@pytest.mark.parametrize("way", ["points", "rows"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("segments", [1, 4])
def test_siblings_share_one_product_and_nothing_changes(
    segments: int, checkpointing: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = curve_model("qwen2", segments, torch.float64)
    model.train()
    if checkpointing:
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    t = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    windows = segments if way == "rows" else 1

    def run() -> list[torch.Tensor]:
        if way == "points":
            out = model(t[:2], input_ids=inputs(8)).logits
        else:
            route = Route("rows", model.coefficients(t), windows=windows, degree=2, rows=8)
            model.runner.set_route(route)
            out = model.model(input_ids=inputs(8), use_cache=False).logits
        return [out, *torch.autograd.grad(out.square().mean(), model.factors)]

    served = count_products(monkeypatch)
    together = run()
    # q/k/v, o, gate/up, down in each of three layers; once more where activations are made again.
    assert sorted(served[:12]) == [1] * 6 + [2] * 3 + [3] * 3 and len(served) == 12 * (1 + checkpointing)
    assert model.runner.route.shared is None or checkpointing
    for layer in model.layers.values():
        layer.siblings, layer.place = (layer,), 0
    served.clear()
    windows = 1
    for found, expected in zip(together, run(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert set(served) == {1}


def test_dropout_gives_each_sibling_an_input_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = curve_model("llama", 1, torch.float32, lora_dropout=0.5)
    served = count_products(monkeypatch)
    model.train()(0.3, input_ids=inputs())
    assert set(served) == {1}
    served.clear()
    model.eval()(0.3, input_ids=inputs())
    assert max(served) == 3


def test_layers_that_see_other_inputs_leave_their_group() -> None:
    model, base = curve_model("llama", 1, torch.float32)
    attention = model.model.model.layers[1].self_attn
    attention.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    expected_twin = peft_twin(base, model.config, adapters_on(model, T[:1]))
    hooked = expected_twin.base_model.model.model.layers[1].self_attn.k_proj
    hooked.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    with torch.no_grad():
        expected = expected_twin(input_ids=inputs()).logits
        for _ in range(2):
            assert relative_error(model(T[:1], input_ids=inputs()).logits, expected) < 1e-5
    assert len(attention.q_proj.siblings) == 1 and len(model.model.model.layers[0].self_attn.q_proj.siblings) == 3


def test_layers_that_are_not_called_leave_their_group() -> None:
    model, _ = curve_model("llama", 1, torch.float32)
    groups = [layer.mlp for layer in model.model.model.layers]
    for mlp in groups:
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))
    with torch.no_grad():
        first, second = (model(T[:1], input_ids=inputs()).logits for _ in range(2))
    torch.testing.assert_close(first, second)
    # What follows in the pass notices; nothing follows the last.
    assert [len(mlp.gate_proj.siblings) for mlp in groups[:-1]] == [1] * (len(groups) - 1)
    assert len(model.model.model.layers[0].self_attn.q_proj.siblings) == 3


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("tokens", [None, torch.tensor([7, 2])])
def test_chosen_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16(
    targets: list[str], tokens: torch.Tensor | None
) -> None:
    model, _ = curve_model("llama", 1, torch.bfloat16, target_modules=targets)
    head, t = model.model.lm_head, torch.tensor([0.3], dtype=torch.float64)
    hidden = torch.randn(2, 5, head.weight.shape[1], generator=torch.Generator().manual_seed(4)).bfloat16()
    hidden = hidden.requires_grad_()
    c = model.coefficients(t).expand(2, -1)
    head.route.kind, head.route.coefficients = "rows", c.to(model.dtype)
    head.route.positions, head.route.position_rows = torch.tensor([9, 0, 3]), torch.tensor([1, 0, 0])
    head.route.token_ids = tokens
    found = head(hidden)
    chosen = hidden.detach().double().flatten(0, 1)[head.route.positions]
    weight = head.weight.double()
    if isinstance(head.inner, CurveLinear):
        a, b = (torch.tensordot(c[0].double(), f.detach().double(), dims=1) for f in (head.inner.A, head.inner.B))
        weight = weight + head.inner.scaling * b.mT @ a
    weight = weight if tokens is None else weight[tokens]
    assert found.dtype == torch.float32
    tolerance = 1e-6 if targets == ["q_proj"] else 4e-3  # the low-rank part passes through r numbers in bfloat16
    assert relative_error(found, chosen @ weight.mT) < tolerance
    (gradient,) = torch.autograd.grad(found.square().sum(), hidden)
    expected = 2 * (chosen @ weight.mT) @ weight
    assert relative_error(gradient.flatten(0, 1)[head.route.positions], expected) < RELATIVE[torch.bfloat16]


@pytest.mark.parametrize(("architecture", "kept"), [("qwen2", ["lm_head"]), ("encoder", None), ("encoder", ["pooler"])])
def test_folding_another_point_leaves_all_weights_where_a_captured_graph_reads_them(
    architecture: str, kept: list[str] | None
) -> None:
    model, _ = curve_model(architecture, 1, torch.float32, modules_to_save=kept)

    def read() -> dict[str, tuple[int, float]]:
        found = {}
        for name, layer in model.layers.items():
            folded = layer._merged if isinstance(layer._merged, tuple) else (layer._merged,)  # type: ignore[attr-defined]
            of_layer = [tensor for tensor in folded if tensor is not None]
            assert of_layer
            found |= {f"{name}.{i}": (x.data_ptr(), float(x.double().sum())) for i, x in enumerate(of_layer)}
        return found

    with torch.inference_mode(), model.merger.points() as fold:
        states = []
        for t in T:
            fold(t)
            states.append(read())
    assert any(type(layer).__name__ == "CurveDense" for layer in model.layers.values())
    for name in states[0]:
        assert len({state[name][0] for state in states}) == 1, name
        assert len({state[name][1] for state in states}) == len(T), name
