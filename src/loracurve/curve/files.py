"""Curves on disk (`curve_config.json`, `control_points.safetensors`) and single adapters as PEFT folders; no pickle.

Where a curve brings weights of its base along, because no checkpoint of the base has them, they lie beside it in
`base_weights.safetensors` by the base's parameter names, and in exported adapters, from which PEFT loads them.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from loracurve.curve.lora_config import check_config, trained_init
from loracurve.curve.lora_space import PREFIX, ControlPoints
from loracurve.curve.retired import refusal, split_retired
from loracurve.curve.spec import CurveSpec
from loracurve.system.errors import UserError, one_line
from loracurve.system.files import read_json, write_json
from loracurve.system.paths import exists, is_file
from loracurve.system.tensors import UNREADABLE, read_tensors, write_tensors

__all__ = [
    "FILES",
    "BaseRecord",
    "check_finite",
    "export_adapter",
    "load_adapter",
    "load_base_record",
    "load_curve",
    "write_curve",
]


LARGEST_ELEMENT = 2.0**63

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError where a tensor holds something else than finite floating-point numbers whose products are finite.

    Squares of larger ones than `LARGEST_ELEMENT` are infinite in float32: no forward pass has numbers to show then.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: expected finite floating-point numbers, found others in {name}")
        if tensor.numel() and (largest := float(tensor.abs().max())) > LARGEST_ELEMENT:
            raise UserError(
                f"{path}: expected finite floating-point numbers of at most {LARGEST_ELEMENT:.2g} in size, found "
                f"{largest:.2g} in {name}"
            )


def load_adapter(folder: str | Path) -> tuple[peft.LoraConfig, dict[str, Tensor]]:
    """Read a PEFT adapter folder (`adapter_config.json`, `adapter_model.safetensors`).

    Returns:
        Its LoraConfig and all its tensors by PEFT name: factors, dense heads, and weights of the base that PEFT writes
        beside them (grown embeddings, an adapted output head).

    Raises:
        UserError: a file is missing or damaged, is a pickle, or is not a plain LoRA adapter.
    """
    folder = Path(folder)
    weights = folder / "adapter_model.safetensors"
    if not is_file(folder / "adapter_config.json"):
        inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))  # one for each adapter name
        raise UserError(
            f"{folder}: expected a PEFT adapter folder, found no adapter_config.json; give the folder PEFT saved"
            f"{f', such as {folder / inside[0]}' if inside else ''}"
        )
    if not is_file(weights):
        pickled = " (adapter_model.bin is a pickle, which is never read: save it as safetensors)"
        raise UserError(
            f"{folder}: no adapter_model.safetensors{pickled if exists(folder / 'adapter_model.bin') else ''}"
        )
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        tensors = read_tensors(weights)
    except UNREADABLE as error:
        raise UserError(f"{folder}: the adapter cannot be read ({one_line(error, 200)})") from error
    try:
        if isinstance(config, peft.LoraConfig):
            saved = config.modules_to_save
            if isinstance(saved, list) and all(isinstance(name, str) for name in saved):
                config.modules_to_save = sorted({*saved})  # PEFT adds a classifier's head at each loading
            for option, plain in vars(peft.LoraConfig()).items():
                if getattr(config, option) is None and (plain is False or plain == {}):
                    setattr(config, option, plain)  # other programs write null
            config.init_lora_weights = trained_init(  # type: ignore[assignment]
                config.init_lora_weights
            )
        check_config(config)
        tensors = _as_peft_reads(tensors)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    check_finite(tensors, weights)
    return config, tensors


# What programs put into names of tensors when they wrap a model or its modules and leave there when they save it.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "modules_to_save"}


def _as_peft_reads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names PEFT saves them under. PEFT leaves those with other names unread, and the base as it is.

    Raises:
        UserError: names that PEFT does not read.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = re.sub(r"(\.lora_[AB])\.default\.weight$", r"\1.weight", name)
        parts = plain.split(".")
        if not name.startswith(PREFIX) or _WRAPPERS.intersection(parts) or plain in named:
            raise UserError(
                f"adapter_model.safetensors: expected names that PEFT reads, such as {PREFIX}LAYER.lora_A.weight, "
                f"found {name[:100]!r}; unwrap the model (compiled, parallel, another class) and save it again by PEFT"
            )
        named[plain] = tensor
    return named


# Of curve folders: 2 has weights of the base beside the curve, which readers of 1 would pass over.
PLAIN, WITH_BASE_WEIGHTS = 1, 2

_BASE_WEIGHTS = "base_weights.safetensors"

# The files of a curve folder; the last one only where a curve brings weights of its base.
FILES = ("curve_config.json", "control_points.safetensors", _BASE_WEIGHTS)


@dataclass(frozen=True)
class BaseRecord:
    """What a curve folder holds of its base."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """by the base's own parameter names: what the curve was trained with and no checkpoint of the base has"""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """by which the base is known again (`model.fingerprint`); empty: nothing is known"""


def _config_dict(config: peft.LoraConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}


def write_curve(
    config: peft.LoraConfig,
    spec: CurveSpec,
    points: ControlPoints,
    folder: Path,
    base: str | None = None,
    record: BaseRecord | None = None,
) -> None:
    """Write a curve folder with what it knows of its base; `base` replaces the name of the base model."""
    record = record or BaseRecord()
    write_tensors(folder / "control_points.safetensors", points)
    if record.weights:
        write_tensors(folder / _BASE_WEIGHTS, record.weights)
    lora = _config_dict(config)
    if base is not None:
        lora["base_model_name_or_path"] = base
    known = dict(record.fingerprint)
    if known and base is not None:
        known["name"] = base
    version = WITH_BASE_WEIGHTS if record.weights else PLAIN
    values = {"format": version, "curve": dataclasses.asdict(spec), "lora": lora, "base": known}
    write_json(folder / "curve_config.json", values)


def load_curve(folder: str | Path) -> tuple[peft.LoraConfig, CurveSpec, ControlPoints]:
    """Read a curve folder; raises UserError for missing or broken parts."""

    folder = Path(folder)
    if not is_file(folder / "curve_config.json"):
        raise UserError(f"{folder}: expected a curve folder, found no curve_config.json")
    values = read_json(folder / "curve_config.json")
    try:
        if values["format"] not in (PLAIN, WITH_BASE_WEIGHTS):
            raise UserError(
                f"expected curve format {PLAIN} or {WITH_BASE_WEIGHTS}, found {values['format']!r}; a newer version of "
                "loracurve wrote it: pip install -U loracurve"
            )
        shape, gone = split_retired("curve", values["curve"])
        if gone:
            raise refusal(", ".join(gone))
        spec = CurveSpec(**{**shape, "trainable": tuple(bool(x) for x in shape["trainable"])})
        config = peft.LoraConfig(**{k: v for k, v in values["lora"].items() if k not in ("peft_type", "auto_mapping")})
        check_config(config)
    except UNREADABLE as error:
        if isinstance(error, UserError):
            raise UserError(f"{folder}/curve_config.json: {error}") from error
        raise UserError(f"{folder}/curve_config.json does not describe a curve ({error!r})") from error
    points = read_tensors(folder / "control_points.safetensors")
    check_finite(points, folder / "control_points.safetensors")
    return config, spec, points


def load_base_record(folder: str | Path) -> BaseRecord:
    """What a curve folder holds of its base; raises UserError for broken parts."""
    folder = Path(folder)
    values = read_json(folder / "curve_config.json")
    known = values.get("base") or {}
    if not isinstance(known, Mapping):
        raise UserError(f"{folder}/curve_config.json: expected what is known of the base, found {known!r:.80}")
    if values.get("format") != WITH_BASE_WEIGHTS:
        return BaseRecord(fingerprint=known)
    tensors = read_tensors(folder / _BASE_WEIGHTS)
    check_finite(tensors, folder / _BASE_WEIGHTS)
    return BaseRecord(tensors, known)


def export_adapter(
    config: peft.LoraConfig,
    adapter: Mapping[str, Tensor],
    folder: str | Path,
    base_weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one adapter as an ordinary PEFT folder, which `peft.PeftModel.from_pretrained` loads, with the weights of
    the base that the curve brings along (by name), which it loads too."""
    folder = Path(folder)
    brought = {f"{PREFIX}{name}": tensor for name, tensor in (base_weights or {}).items()}
    write_tensors(folder / "adapter_model.safetensors", {**brought, **adapter})
    config = copy.deepcopy(config)
    config.inference_mode = True
    if config.task_type == peft.TaskType.SEQ_CLS and not config.modules_to_save:
        config.modules_to_save = ["classifier", "score"]
    write_json(folder / "adapter_config.json", _config_dict(config))
