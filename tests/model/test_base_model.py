"""Bases whose weights bitsandbytes holds in few bits: the same results as PEFT on them, and nothing is unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.made_runs import QUICK, base_folder, config_file, data_folder
from helpers.tiny import adapters_on, lora_config, peft_twin, random_points

from loracurve.cli import main
from loracurve.curve.spec import CurveSpec
from loracurve.model.base_model import load_base
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.system.files import read_json

bitsandbytes = pytest.importorskip("bitsandbytes")
T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual tiny model, wider: weights are quantised in blocks of 64."""
    found = base_folder(tmp_path_factory.mktemp("base") / "qwen2", "qwen2")
    config = transformers.AutoConfig.from_pretrained(found)
    config.hidden_size, config.intermediate_size = 64, 128
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(found)
    return found


def inputs() -> torch.Tensor:
    return torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("kind", "segments"), [("nf4", 1), ("nf4", 2), ("int8", 2)])
def test_points_equal_a_loop_over_peft_adapters(folder: Path, kind: Any, segments: int) -> None:
    base, _ = load_base(str(folder), dtype="float32", quantise=kind)
    kinds = {type(m).__name__ for m in base.get_decoder().layers.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind] in kinds and "Linear" not in kinds
    model = CurveModel(base, lora_config("qwen2"), CurveSpec(segments, 2))
    model.set_curve(model.spec, random_points(model))
    twin = peft_twin(load_base(str(folder), dtype="float32", quantise=kind)[0], model.config, adapters_on(model, T))
    ids = inputs()
    model.train(), twin.train()  # in evaluation mode a CPU has kernels of its own for them
    expected = []
    for i in range(len(T)):
        twin.set_adapter(f"p{i}")
        expected.append(twin(input_ids=ids).logits.detach())
    found = model(T, input_ids=ids).logits
    torch.testing.assert_close(found.view_as(torch.stack(expected)), torch.stack(expected), rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(found.square().mean(), model.factors)
    assert all(g.isfinite().all() for g in gradients) and sum(float(g.norm()) for g in gradients) > 0
    assert all(not w.is_floating_point() for n, w in base.named_parameters() if "base_layer.weight" in n)
    with pytest.raises(UserError, match="floating-point base weights"):
        model.layers["model.layers.0.self_attn.q_proj"].merge(model.coefficients(T[1]))


@pytest.mark.parametrize("noise", ["none", "lora_space"])
def test_a_run_on_a_quantised_base(folder: Path, tmp_path: Path, noise: str) -> None:
    data = data_folder(tmp_path / "data", "letter")
    config = config_file(tmp_path / "config.yaml", folder, data, "letter")
    run = tmp_path / "run"
    options = ["--model.quantise", "nf4", f"--curve_training.perturbation.kind={noise}"]
    assert main(["fit", str(config), "--out", str(run), *QUICK, *options]) == 0
    history = read_json(run / "training" / "history.json")
    assert isinstance(history, list) and len(history) == 4
    assert all(entry["grad_norm"] > 1e-4 for entry in history), "gradients flow through quantised weights"
    assert main(["evaluate", str(run), "--points", "3"]) == 0


def test_what_cannot_be_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'loracurve\[quant\]'"):
        load_base(str(folder), quantise="nf4")
