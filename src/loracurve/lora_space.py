"""LoRA space: which maps of a model are adapted, control points as named tensors, their initial draws.

Control points are a `dict[str, Tensor]` with PEFT's parameter names (`base_model.model.<map>.lora_A.weight`, ...) and a
leading dimension K; A is [K, r, n_in], B is [K, n_out, r], dense heads [K, ...]. One adapter is such a dict without K.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from loracurve.errors import UserError
from loracurve.heads import CurveDense
from loracurve.layers import CurveLayer, CurveLinear, join_siblings
from loracurve.randomness import generator
from loracurve.routes import Route

__all__ = [
    "ControlPoints",
    "PREFIX",
    "adapter_at",
    "check_config",
    "check_finite",
    "initial_control_points",
    "inject",
    "load_adapter",
    "stack_adapters",
]

ControlPoints = dict[str, Tensor]

# What safetensors and PEFT raise for headers that are no headers, dtypes that torch lacks, files that cannot be mapped,
# and configs of other types.
UNREADABLE = (
    ArithmeticError, AttributeError, KeyError, MemoryError, OSError, RecursionError, RuntimeError, SafetensorError,
    TypeError, ValueError,
)  # fmt: skip
MOST_RANK = 2**16
MOST_REPETITIONS = 4

PREFIX = "base_model.model."

# Options of peft.LoraConfig that change the map itself, so that (A, B) alone would not describe the adapter.
_UNSUPPORTED = {
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "megatron_config": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
    "monteclora_config": None,
    "velora_config": None,
    "kasa_config": None,
}


def check_config(config: peft.PeftConfig) -> None:
    """Refuse adapter kinds whose parameters are not plain (A, B) pairs and dense heads; raises UserError."""
    if not isinstance(config, peft.LoraConfig):
        raise UserError(f"expected a LoRA adapter, found PEFT type {config.peft_type}; use peft.LoraConfig")
    for option, plain in _UNSUPPORTED.items():
        if getattr(config, option, plain) not in (plain, None, False, {}, []):
            raise UserError(f"LoRA option {option} is not supported on curves; leave it at {plain}")
    _check_types(config)
    if config.bias != "none":
        raise UserError(f"LoRA option bias={config.bias!r} is not supported on curves; use bias='none'")
    if config.init_lora_weights not in (True, "gaussian"):
        raise UserError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported: curves draw A at random and start B "
            "at 0; use True or 'gaussian'"
        )


def _check_types(config: peft.LoraConfig) -> None:
    """PEFT takes any value and stumbles over it later."""

    def words(value: object) -> bool:
        return isinstance(value, str) or (isinstance(value, list | set) and all(isinstance(v, str) for v in value))

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def rank(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_RANK

    def layers(value: object) -> bool:
        listed = value if isinstance(value, list) else [value]
        return all(isinstance(v, int) and 0 <= v < 100_000 for v in listed)

    sound = {
        "r": rank(config.r),
        "lora_alpha": number(config.lora_alpha),
        "lora_dropout": number(config.lora_dropout) and 0 <= config.lora_dropout < 1,
        "use_rslora": isinstance(config.use_rslora, bool),
        "fan_in_fan_out": isinstance(config.fan_in_fan_out, bool),
        "target_modules": config.target_modules is None or words(config.target_modules),
        "exclude_modules": config.exclude_modules is None or words(config.exclude_modules),
        "modules_to_save": config.modules_to_save is None
        or (words(config.modules_to_save) and not isinstance(config.modules_to_save, str)),
        "layers_to_transform": config.layers_to_transform is None or layers(config.layers_to_transform),
        "layers_pattern": config.layers_pattern is None or words(config.layers_pattern),
        "rank_pattern": isinstance(config.rank_pattern, dict) and all(map(rank, config.rank_pattern.values())),
        "alpha_pattern": isinstance(config.alpha_pattern, dict) and all(map(number, config.alpha_pattern.values())),
        "base_model_name_or_path": isinstance(config.base_model_name_or_path, str | None),
    }
    named = (config.target_modules, config.exclude_modules, config.modules_to_save, config.layers_pattern)
    for option, fine in sound.items():
        if not fine:
            found = repr(getattr(config, option))
            raise UserError(f"LoRA option {option}: expected a value of LoRA's, found {found[:80]}")
    patterns = [p for value in named if value for p in ([value] if isinstance(value, str) else value)]
    for pattern in [*patterns, *(config.rank_pattern or {}), *(config.alpha_pattern or {})]:
        _check_pattern(pattern)


def _check_pattern(pattern: str) -> None:
    """Refuse regular expressions that could be matched for hours: repeated groups, and many repetitions in a row."""
    plain = re.sub(r"\\.|\[\^?\]?[^]]*\]", "x", pattern)
    if len(pattern) > 1000 or re.search(r"\)\s*[*+{]", plain) or len(re.findall(r"[*+{]", plain)) > MOST_REPETITIONS:
        raise UserError(
            f"LoRA targets: expected a regular expression with at most {MOST_REPETITIONS} of * and + and no repeated "
            f"group, found {pattern[:80]!r}; name the modules in a list"
        )


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError where a tensor holds something else than finite floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: expected finite floating-point numbers, found others in {name}")


def inject(model: nn.Module, config: peft.LoraConfig, route: Route) -> dict[str, CurveLayer]:
    """Put curve layers into `model` wherever PEFT would put LoRA layers or copies of `modules_to_save`.

    Target matching (names, regex, "all-linear", rank_pattern, alpha_pattern, rslora, ...) is PEFT's own.

    Returns:
        The curve layers by module name, without control points yet. The model's parameters are frozen.

    Raises:
        UserError: PEFT finds no target, or a target is not a linear map.
    """
    check_config(config)
    matching = copy.deepcopy(config)
    matching.init_lora_weights = True
    if matching.task_type == peft.TaskType.SEQ_CLS:
        # As peft.PeftModelForSequenceClassification does: the new head is trained and saved.
        matching.modules_to_save = sorted({*(matching.modules_to_save or []), "classifier", "score"})
    saved = matching.modules_to_save or []
    try:
        peft.inject_adapter_in_model(matching, model, low_cpu_mem_usage=True)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, re.error) as error:
        raise UserError(f"LoRA targets do not fit this model: {' '.join(str(error).split())[:300]}") from error
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            _replace(model, name, module.original_module)
    model.requires_grad_(False)
    layers: dict[str, CurveLayer] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            layers[name] = _curve_linear(name, module, route)
        elif isinstance(module, nn.Linear) and any(_belongs(name, key) for key in saved):
            layers[name] = CurveDense(module, route)
        elif any(True for _ in module.parameters(recurse=False)) and any(_belongs(name, key) for key in saved):
            raise UserError(
                f"modules_to_save: {name} is a {type(module).__name__}; only linear layers can be curve points"
            )
    for name, layer in layers.items():
        _replace(model, name, layer)
    join_siblings(layers)
    return layers


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _belongs(name: str, key: str) -> bool:
    """Whether module `name` is the module that `key` names, or lies inside it."""
    return f".{key}." in f".{name}."


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


def adapter_at(points: ControlPoints, coefficients: Tensor) -> dict[str, Tensor]:
    """One adapter: sum_k c_k P_k for coefficients [K], taken in float64 and returned in the points' dtype."""
    return {
        name: torch.tensordot(coefficients.double().to(p.device), p.detach().double(), dims=1).to(p.dtype)
        for name, p in points.items()
    }


def stack_adapters(adapters: list[dict[str, Tensor]]) -> ControlPoints:
    """Stack M adapters of the same names and shapes into tensors of leading dimension M."""
    first = adapters[0]
    for i, adapter in enumerate(adapters[1:], 1):
        if adapter.keys() != first.keys():
            odd = sorted(adapter.keys() ^ first.keys())[0]
            raise UserError(f"adapters have different targets: {odd} is not in both adapter 0 and adapter {i}")
        for name, tensor in adapter.items():
            if tensor.shape != first[name].shape:
                raise UserError(
                    f"adapters have different shapes at {name}: {list(first[name].shape)} in adapter 0, "
                    f"{list(tensor.shape)} in adapter {i}; all ranks and targets must agree"
                )
    return {name: torch.stack([a[name].float() for a in adapters]) for name in first}


def load_adapter(folder: str | Path) -> tuple[peft.LoraConfig, dict[str, Tensor]]:
    """Read a PEFT adapter folder (`adapter_config.json`, `adapter_model.safetensors`).

    Returns:
        Its LoraConfig and its tensors by PEFT name.

    Raises:
        UserError: a file is missing or damaged, is a pickle, or is not a plain LoRA adapter.
    """
    folder = Path(folder)
    weights = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: expected a PEFT adapter folder, found no adapter_config.json; give the folder PEFT saved"
        )
    if not weights.is_file():
        pickled = " (adapter_model.bin is a pickle, which is never read: save it as safetensors)"
        raise UserError(
            f"{folder}: no adapter_model.safetensors{pickled if (folder / 'adapter_model.bin').exists() else ''}"
        )
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        tensors = load_file(weights)
    except UNREADABLE as error:
        raise UserError(f"{folder}: the adapter cannot be read ({' '.join(str(error).split())[:200]})") from error
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    check_finite(tensors, weights)
    # PEFT writes embedding or head weights beside the factors when lm_head is a target; they belong to the base model.
    return config, {
        n: t for n, t in tensors.items() if ".base_layer." not in n and not n.endswith("embed_tokens.weight")
    }
