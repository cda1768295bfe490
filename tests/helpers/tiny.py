"""Tiny models of real architectures with random weights, and PEFT twins to compare with."""

from __future__ import annotations

import copy

import peft
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from loracurve.curve.lora_space import adapter_at
from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def tiny(architecture: str, dtype: torch.dtype = torch.float32, vocabulary: int = 300, labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    if architecture == "qwen2":
        config = Qwen2Config(vocab_size=vocabulary, num_key_value_heads=2, max_position_embeddings=512, **SIZES)
        model: nn.Module = Qwen2ForCausalLM(config)
    elif architecture == "llama":
        config = LlamaConfig(
            vocab_size=vocabulary, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, **SIZES
        )
        model = LlamaForCausalLM(config)
    else:
        config = BertConfig(vocab_size=vocabulary, max_position_embeddings=512, num_labels=labels, **SIZES)
        model = BertForSequenceClassification(config)
    for parameter in model.parameters():
        # Norm-one initialisation makes tiny models nearly linear; spread them so that errors would show.
        if parameter.dim() > 1:
            parameter.data.mul_(5)
    return model.to(dtype).eval()


def lora_config(architecture: str, **options: object) -> peft.LoraConfig:
    task = peft.TaskType.SEQ_CLS if architecture == "encoder" else peft.TaskType.CAUSAL_LM
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    return peft.LoraConfig(task_type=task, **options)  # type: ignore[arg-type]


def random_points(model: object, seed: int = 1, scale: float = 0.2) -> dict[str, Tensor]:
    """Control points of a CurveModel, all entries drawn, so that no factor is zero."""
    draw = torch.Generator().manual_seed(seed)
    points = model.control_points()  # type: ignore[attr-defined]
    return {n: scale * torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in points.items()}


def peft_twin(base: nn.Module, config: peft.LoraConfig, adapters: list[dict[str, Tensor]]) -> peft.PeftModel:
    """The same base as a PEFT model with the given adapters, named p0, p1, ..."""
    model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config), "p0", autocast_adapter_dtype=False)
    for i in range(1, len(adapters)):
        model.add_adapter(f"p{i}", copy.deepcopy(config))
    for i, adapter in enumerate(adapters):
        result = peft.set_peft_model_state_dict(model, {k: v.to(model.dtype) for k, v in adapter.items()}, f"p{i}")
        assert not result.unexpected_keys
    return model.eval()


def adapters_on(model: object, t: Tensor) -> list[dict[str, Tensor]]:
    return [adapter_at(model.control_points(), c) for c in model.coefficients(t)]  # type: ignore[attr-defined]


T = torch.tensor([0.0, 0.2, 0.5, 0.85, 1.0], dtype=torch.float64)
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def curve_model(
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
