"""Putting curve layers where PEFT's own target matching finds linear maps, and drawing their factors."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from loracurve.curve.lora_config import check_config
from loracurve.curve.lora_space import PREFIX, ControlPoints
from loracurve.model.heads import CurveDense, OutputHead
from loracurve.model.layers import CurveLayer, CurveLinear, join_siblings
from loracurve.model.routes import Route
from loracurve.system.errors import UserError, one_line
from loracurve.system.randomness import generator

__all__ = ["base_parameters", "initial_control_points", "inject"]


def inject(model: nn.Module, config: peft.LoraConfig, route: Route) -> dict[str, CurveLayer]:
    """Put curve layers into `model` wherever PEFT would put LoRA layers or copies of `modules_to_save`.

    Target matching (names, regex, "all-linear", rank_pattern, alpha_pattern, rslora, ...) is PEFT's own.

    Returns:
        The curve layers by module name, without control points yet. The model's parameters are frozen.

    Raises:
        UserError: PEFT finds no target, or a target is not a linear map.
    """
    check_config(config)
    _check_plain(model)
    training = model.training
    matching = copy.deepcopy(config)
    matching.init_lora_weights = True
    if matching.task_type == peft.TaskType.SEQ_CLS:
        # As peft.PeftModelForSequenceClassification does: the new head is trained and saved.
        matching.modules_to_save = sorted({*(matching.modules_to_save or []), "classifier", "score"})
    try:
        peft.inject_adapter_in_model(matching, model, low_cpu_mem_usage=True)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, re.error) as error:
        raise UserError(f"LoRA targets do not fit this model: {one_line(error, 300)}") from error
    whole = []  # PEFT matches the ends of names, so DistilBERT's pre_classifier is trained beside its classifier
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            whole.append(name)
            _replace(model, name, module.original_module)
    model.requires_grad_(False)
    layers: dict[str, CurveLayer] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            layers[name] = _curve_linear(name, module, route)
        elif not any(f"{name}.".startswith(f"{part}.") for part in whole):
            continue
        elif isinstance(module, nn.Linear):
            layers[name] = CurveDense(module, route)
        elif any(True for _ in module.parameters(recurse=False)):
            raise UserError(
                f"modules_to_save: {name} is a {type(module).__name__}; only linear layers can be curve points"
            )
    for name, layer in layers.items():
        _replace(model, name, layer)
        layer.train(training)
    join_siblings(layers)
    return layers


def _check_plain(model: nn.Module) -> None:
    """Refuse a base that another library has wrapped or put adapters into: names and outputs are no longer its own."""
    wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod")
    if wrapped:
        raise UserError(
            f"expected a base model, found it wrapped in {type(model).__name__}; give the model itself, compile or "
            "spread it afterwards"
        )
    if isinstance(model, peft.PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise UserError(
            "expected a base model, found one with adapters in it; give its own base, or merge them into it "
            "(merge_and_unload)"
        )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _curve_linear(name: str, module: LoraLayer, route: Route) -> CurveLinear:
    (adapter,) = module.r
    if adapter not in module.lora_A:
        raise UserError(
            f"LoRA target {name} is an embedding; only linear maps lie on a curve: take it out of target_modules"
        )
    base = module.get_base_layer()
    if not isinstance(base, nn.Linear) and type(base).__name__ not in ("Conv1D", "Linear4bit", "Linear8bitLt"):
        raise UserError(f"LoRA target {name} is a {type(base).__name__}; only linear maps lie on a curve")
    if hasattr(base, "support_avx512bf16_for_cpu"):
        # bitsandbytes packs such weights anew at the first evaluation on a CPU, and from then on gives no gradients.
        base.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    dropout = getattr(module.lora_dropout[adapter], "p", 0.0)
    rank, scaling = module.r[adapter], module.scaling[adapter]
    return CurveLinear(base, route, rank, scaling, dropout, int(module.in_features or 0), int(module.out_features or 0))


def initial_control_points(
    layers: Mapping[str, CurveLayer], seeds: list[int], init: bool | str = True
) -> ControlPoints:
    """Draw K = len(seeds) control points as PEFT initialises adapters, each from its own seed.

    A is Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(n_in), 1/sqrt(n_in)), or N(0, 1/r^2) for `init="gaussian"`;
    B = 0. Dense heads have no gauge, so all control points share the base model's own head.
    """
    points: ControlPoints = {}
    draws = [generator(seed, "init") for seed in seeds]
    for name, layer in layers.items():
        if isinstance(layer, CurveDense):
            for suffix, tensor in layer.base_layer.named_parameters():
                points[f"{PREFIX}{name}.{suffix}"] = torch.stack([tensor.detach().float()] * len(seeds))
            continue
        assert isinstance(layer, CurveLinear)
        shape = (layer.rank, layer.in_features)
        if init == "gaussian":
            a = [torch.randn(shape, generator=g) / layer.rank for g in draws]
        else:
            a = [(torch.rand(shape, generator=g) * 2 - 1) / math.sqrt(layer.in_features) for g in draws]
        points[f"{PREFIX}{name}.lora_A.weight"] = torch.stack(a)
        points[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(len(seeds), layer.out_features, layer.rank)
    return points


def base_parameters(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The base's own parameters by the names that they have without curve layers; tied ones by each of their names."""
    if isinstance(module, CurveLayer | OutputHead):
        return base_parameters(module.inner if isinstance(module, OutputHead) else module.base_layer, prefix)
    found: dict[str, Tensor] = {prefix + name: p for name, p in module._parameters.items() if p is not None}
    for name, child in module._modules.items():
        if child is not None:
            found |= base_parameters(child, f"{prefix}{name}.")
    return found
