"""A curve model against a loop over PEFT adapters in every way to run; saving, loading, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from helpers import matrix
from helpers.tiny import RELATIVE, T, adapters_on, curve_model, inputs, lora_config, peft_twin, relative_error, tiny

from loracurve.curve.files import load_adapter
from loracurve.curve.index import read_index
from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.model.routes import Route
from loracurve.system.errors import UserError


def peft_logits(twin: peft.PeftModel, count: int, ids: torch.Tensor) -> torch.Tensor:
    out = []
    for i in range(count):
        twin.set_adapter(f"p{i}")
        with torch.no_grad():
            out.append(twin(input_ids=ids).logits)
    return torch.stack(out)


@matrix.dtypes
@matrix.segments
@matrix.architectures
def test_three_ways_to_run_equal_a_loop_over_peft_adapters(
    architecture: str, segments: int, dtype: torch.dtype
) -> None:
    model, base = curve_model(architecture, segments, dtype)
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
        model.runner.set_route(rows_route(model, own))
        rows = model.model(input_ids=ids.repeat(len(T), 1)).logits.view_as(expected)
    for i in range(len(T)):
        for j in range(len(ids)):  # a row alone: what rounds differently on another processor does not average out
            assert relative_error(rows[i, j], expected[(i + j) % len(T), j]) < 3 * RELATIVE[dtype]
            assert relative_error(rows[i, j], expected[(i + j + 1) % len(T), j]) > 6 * RELATIVE[dtype]


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
    model, base = curve_model("llama", 2, torch.float32, **options)
    twin = peft_twin(base, model.config, adapters_on(model, T))
    ids = inputs()
    expected = peft_logits(twin, len(T), ids)
    with torch.no_grad():
        assert relative_error(model(T, input_ids=ids).logits.view_as(expected), expected) < 1e-5
        with model.merged(0.2):
            assert relative_error(model(input_ids=ids).logits, expected[1]) < 1e-5


def test_lower_layers_run_once_for_all_points() -> None:
    model, _ = curve_model("qwen2", 1, torch.float32, layers_to_transform=[2], target_modules=["k_proj", "up_proj"])
    model.runner.try_out()  # which runs the model, too
    seen: list[int] = []
    for layer in model.model.model.layers:
        layer.mlp.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[0]))
    with torch.no_grad():
        model(T, input_ids=inputs(rows=4))
    assert seen == [4, 4, 4 * len(T)]


@matrix.architectures
def test_gradient_to_a_control_point_is_its_coefficient_times_the_gradient_at_theta(architecture: str) -> None:
    model, _ = curve_model(architecture, 2, torch.float64)
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


def test_base_weights_are_never_modified() -> None:
    model, base = curve_model("llama", 2, torch.bfloat16, target_modules=["q_proj", "lm_head"])
    with torch.no_grad(), model.merged(0.5):
        model(input_ids=inputs())
    model(0.5, input_ids=inputs()).logits.float().mean().backward()
    ours = {n.replace(".base_layer", "").replace(".inner", ""): p for n, p in model.model.named_parameters()}
    for name, p in base.named_parameters():
        assert torch.equal(ours[name], p), name
        assert ours[name].grad is None


@matrix.architectures
def test_saving_loading_and_export(architecture: str, tmp_path: Path) -> None:
    model, base = curve_model(architecture, 2, torch.float32)
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


def test_arguments_in_another_order_are_refused_in_one_line(tmp_path: Path) -> None:
    """PEFT takes the base before the folder, here a curve's folder is first."""
    model, base = curve_model("llama", 2, torch.float32)
    model.save_pretrained(tmp_path / "curve")
    with pytest.raises(UserError, match="found LlamaForCausalLM in place of the folder; give the folder first"):
        CurveModel.from_pretrained(base, tmp_path / "curve")  # type: ignore[arg-type]
    for found in (base, "adapters/a", tmp_path):
        with pytest.raises(UserError, match=r"a list of adapter folders, found .* in place of the list; give the base"):
            CurveModel.from_adapters(["adapters/a", "adapters/b"], found)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="base: expected a model, its folder or its name on the hub, found a LoraConfig"
    ):
        CurveModel.from_config(lora_config("llama"), base)  # type: ignore[arg-type]


def test_points_are_written_with_their_index(tmp_path: Path) -> None:
    model, base = curve_model("llama", 2, torch.float32)
    model.export_points(tmp_path / "points", torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64), [0.25, 0.5, 0.25])
    names, weights = read_index(tmp_path / "points")
    assert weights.tolist() == [0.25, 0.5, 0.25]
    for name, t in zip(names, (0.0, 0.3, 1.0), strict=True):
        _, tensors = load_adapter(tmp_path / "points" / name)
        assert tensors.keys() == model.adapter(t).keys()
        assert all(torch.equal(tensor, tensors[n]) for n, tensor in model.adapter(t).items())
    model.export_points(tmp_path / "equal", [0.0, 1.0])
    assert read_index(tmp_path / "equal")[1].tolist() == [0.5, 0.5]
    for t, given, message in (
        ([0.0], None, "exists already"),
        ([0.0, 1.0], [1.0], "expected one for each of the 2 points, found 1"),
        ([0.0, 1.0], [0.5, 0.6], "expected weights >= 0 with sum 1"),
        ([], None, "expected weights >= 0 with sum 1"),
    ):
        folder = tmp_path / ("points" if given is None and t else "other")
        with pytest.raises(UserError, match=message):
            model.export_points(folder, t, given)
    assert not (tmp_path / "other").exists()


def test_damaged_curve_folders(tmp_path: Path) -> None:
    model, base = curve_model("llama", 2, torch.float32)
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
