"""The curve layers against a loop over PEFT adapters, in every way to run."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from tiny import ARCHITECTURES, adapters_on, lora_config, peft_twin, random_points, tiny

from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.model.layers import CurveLinear
from loracurve.model.routes import Route
from loracurve.system.errors import UserError

T = torch.tensor([0.0, 0.2, 0.5, 0.85, 1.0], dtype=torch.float64)
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def build(
    architecture: str, segments: int, dtype: torch.dtype, **options: object
) -> tuple[CurveModel, torch.nn.Module]:
    base = tiny(architecture, dtype)
    untouched = copy.deepcopy(base)
    model = CurveModel(base, lora_config(architecture, **options), CurveSpec(segments, 2))
    model.set_curve(model.spec, random_points(model))
    return model.eval(), untouched


def inputs(rows: int = 4, size: int = 9) -> torch.Tensor:
    return torch.randint(3, 300, (rows, size), generator=torch.Generator().manual_seed(2))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().float().norm() / expected.float().norm())


def peft_logits(twin: peft.PeftModel, count: int, ids: torch.Tensor) -> torch.Tensor:
    out = []
    for i in range(count):
        twin.set_adapter(f"p{i}")
        with torch.no_grad():
            out.append(twin(input_ids=ids).logits)
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_three_ways_to_run_equal_a_loop_over_peft_adapters(
    architecture: str, segments: int, dtype: torch.dtype
) -> None:
    model, base = build(architecture, segments, dtype)
    twin = peft_twin(base, model.config, adapters_on(model, T))
    ids = inputs()
    expected = peft_logits(twin, len(T), ids)
    with torch.no_grad():
        points = model(T, input_ids=ids).logits.view_as(expected)
        assert relative_error(points, expected) < RELATIVE[dtype]
        for i, t in enumerate(T.tolist()):
            with model.merged(t):
                assert relative_error(model(input_ids=ids).logits, expected[i]) < 2 * RELATIVE[dtype]
        # rows: row j runs at its own t; here row j of replica i at t_(i + j)
        own = torch.stack([T.roll(-j)[: len(T)] for j in range(len(ids))], dim=1)
        model._set_route(rows_route(model, own))
        rows = model.model(input_ids=ids.repeat(len(T), 1)).logits.view_as(expected)
    for i in range(len(T)):
        for j in range(len(ids)):
            assert relative_error(rows[i, j], expected[(i + j) % len(T), j]) < 2 * RELATIVE[dtype]


def rows_route(model: CurveModel, t: torch.Tensor) -> object:
    flat = model.coefficients(t).flatten(0, 1).to(model.dtype)
    return Route("rows", flat, replicas=t.shape[0], rows=t.shape[1])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        {"target_modules": r".*\.(q|k)_proj", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 16}},
        {"use_rslora": True, "layers_to_transform": [1, 2], "target_modules": ["q_proj", "down_proj"]},
        {"lora_dropout": 0.5},
    ],
)
def test_peft_options(options: dict[str, object]) -> None:
    model, base = build("llama", 2, torch.float32, **options)
    twin = peft_twin(base, model.config, adapters_on(model, T))
    ids = inputs()
    expected = peft_logits(twin, len(T), ids)
    with torch.no_grad():
        assert relative_error(model(T, input_ids=ids).logits.view_as(expected), expected) < 1e-5
        with model.merged(0.2):
            assert relative_error(model(input_ids=ids).logits, expected[1]) < 1e-5


def test_lower_layers_run_once_for_all_points() -> None:
    model, _ = build("qwen2", 1, torch.float32, layers_to_transform=[2], target_modules=["k_proj", "up_proj"])
    seen: list[int] = []
    for layer in model.model.model.layers:
        layer.mlp.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[0]))
    with torch.no_grad():
        model(T, input_ids=inputs(rows=4))
    assert seen == [4, 4, 4 * len(T)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_to_a_control_point_is_its_coefficient_times_the_gradient_at_theta(architecture: str) -> None:
    model, _ = build(architecture, 2, torch.float64)
    ids, t = inputs(), 0.3
    c = model.coefficients(torch.tensor(t, dtype=torch.float64))

    def gradients(points: dict[str, torch.Tensor], spec: CurveSpec, t: float) -> list[torch.Tensor]:
        model.set_curve(spec, points)
        model(t, input_ids=ids).logits.pow(2).mean().backward()
        return [p.grad for p in model.factors]

    stacked = model.control_points()
    single = {n: p[None] for n, p in model.adapter(t).items()}
    on_curve = gradients(stacked, CurveSpec(2, 2), t)
    at_theta = gradients(single, CurveSpec.slots(1), 0.0)
    for g, g0 in zip(on_curve, at_theta, strict=True):
        expected = c.view(-1, *[1] * (g.dim() - 1)) * g0
        torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-12)


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of layers that each down-projection serves."""
    served: list[int] = []
    project = CurveLinear._project
    monkeypatch.setattr(
        CurveLinear, "_project", lambda self, x, layers: served.append(len(layers)) or project(self, x, layers)
    )
    return served


@pytest.mark.parametrize("way", ["points", "rows"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("segments", [1, 4])
def test_siblings_share_one_product_and_nothing_changes(
    segments: int, checkpointing: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = build("qwen2", segments, torch.float64)
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
            model._set_route(route)
            out = model.model(input_ids=inputs(8), use_cache=False).logits
        return [out, *torch.autograd.grad(out.square().mean(), model.factors)]

    served = count_products(monkeypatch)
    together = run()
    # q/k/v, o, gate/up, down in each of three layers; once more where activations are made again.
    assert sorted(served[:12]) == [1] * 6 + [2] * 3 + [3] * 3 and len(served) == 12 * (1 + checkpointing)
    assert model.route.shared is None or checkpointing
    for layer in model.layers.values():
        layer.siblings, layer.place = (layer,), 0
    served.clear()
    windows = 1
    for found, expected in zip(together, run(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert set(served) == {1}


def test_dropout_gives_each_sibling_an_input_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build("llama", 1, torch.float32, lora_dropout=0.5)
    served = count_products(monkeypatch)
    model.train()(0.3, input_ids=inputs())
    assert set(served) == {1}
    served.clear()
    model.eval()(0.3, input_ids=inputs())
    assert max(served) == 3


def test_layers_that_see_other_inputs_leave_their_group() -> None:
    model, base = build("llama", 1, torch.float32)
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


def test_base_weights_are_never_modified() -> None:
    model, base = build("llama", 2, torch.bfloat16, target_modules=["q_proj", "lm_head"])
    with torch.no_grad(), model.merged(0.5):
        model(input_ids=inputs())
    model(0.5, input_ids=inputs()).logits.float().mean().backward()
    ours = {n.replace(".base_layer", "").replace(".inner", ""): p for n, p in model.model.named_parameters()}
    for name, p in base.named_parameters():
        assert torch.equal(ours[name], p), name
        assert ours[name].grad is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saving_loading_and_export(architecture: str, tmp_path: Path) -> None:
    model, base = build(architecture, 2, torch.float32)
    ids = inputs()
    with torch.no_grad():
        expected = model(0.3, input_ids=ids).logits
    model.save_pretrained(tmp_path / "curve")
    again = CurveModel.from_pretrained(tmp_path / "curve", copy.deepcopy(base))
    assert again.spec == model.spec
    with torch.no_grad():
        assert torch.equal(again(0.3, input_ids=ids).logits, expected)
    model.export(tmp_path / "adapter", 0.3)
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert relative_error(twin(input_ids=ids).logits, expected) < 1e-5


def test_anchored_curve_from_peft_folders(tmp_path: Path) -> None:
    base = tiny("llama")
    ids = inputs()
    logits = []
    for seed in range(3):
        torch.manual_seed(seed)
        trained = peft.get_peft_model(copy.deepcopy(base), lora_config("llama"))
        for n, p in trained.named_parameters():
            if "lora_B" in n:
                p.data.normal_(0, 0.2)
        trained.save_pretrained(tmp_path / str(seed))
        with torch.no_grad():
            logits.append(trained.eval()(input_ids=ids).logits)
    folders = [tmp_path / str(s) for s in range(3)]
    model = CurveModel.from_adapters(copy.deepcopy(base), folders)
    assert model.spec.mask.tolist() == [False, True, False, True, False]
    with torch.no_grad():
        found = model(torch.tensor([0.0, 0.5, 1.0]), input_ids=ids).logits.view(3, *logits[0].shape)
    for mine, theirs in zip(found, logits, strict=True):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["nothing_here"]}, "do not fit"),
        ({"target_modules": ["embed_tokens"]}, "embedding"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        CurveModel(tiny("llama"), lora_config("llama", **options))
    assert "\n" not in str(error.value)


def test_damaged_curve_folders(tmp_path: Path) -> None:
    model, base = build("llama", 2, torch.float32)
    with pytest.raises(UserError, match="curve_config.json"):
        CurveModel.from_pretrained(tmp_path, base)
    model.save_pretrained(tmp_path)
    (tmp_path / "control_points.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all")
    with pytest.raises(UserError, match="damaged"):
        CurveModel.from_pretrained(tmp_path, copy.deepcopy(base))
    points = model.control_points()
    name = sorted(points)[0]
    with pytest.raises(UserError, match="missing"):
        model.set_curve(model.spec, {n: p for n, p in points.items() if n != name})
    with pytest.raises(UserError, match="of shape"):
        model.set_curve(model.spec, points | {name: points[name][:, :1]})
    with pytest.raises(UserError, match="unknown tensor"):
        model.set_curve(model.spec, points | {"base_model.model.extra.weight": points[name]})


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("tokens", [None, torch.tensor([7, 2])])
def test_chosen_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16(
    targets: list[str], tokens: torch.Tensor | None
) -> None:
    model, _ = build("llama", 1, torch.bfloat16, target_modules=targets)
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
