"""Curves on disk (`curve_config.json`, `control_points.safetensors`) and single adapters as PEFT folders; no pickle."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor

from loracurve.curve.lora_config import check_config
from loracurve.curve.lora_space import ControlPoints
from loracurve.curve.retired import refusal, split_retired
from loracurve.curve.spec import CurveSpec
from loracurve.system.errors import UserError, one_line
from loracurve.system.files import read_json, write_json
from loracurve.system.tensors import UNREADABLE, read_tensors, write_tensors

__all__ = ["FILES", "check_finite", "export_adapter", "load_adapter", "load_curve", "write_curve"]


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError where a tensor holds something else than finite floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: expected finite floating-point numbers, found others in {name}")


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
        raise UserError(f"{folder}: the adapter cannot be read ({one_line(error, 200)})") from error
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    check_finite(tensors, weights)
    # PEFT writes embedding or head weights beside the factors when lm_head is a target; they belong to the base model.
    return config, {
        n: t for n, t in tensors.items() if ".base_layer." not in n and not n.endswith("embed_tokens.weight")
    }


FORMAT = 1

# The files of a curve folder.
FILES = ("curve_config.json", "control_points.safetensors")


def _config_dict(config: peft.LoraConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}


def write_curve(
    config: peft.LoraConfig, spec: CurveSpec, points: ControlPoints, folder: Path, base: str | None = None
) -> None:
    """`save_curve` of its parts; `base` replaces the name of the base model."""
    write_tensors(folder / "control_points.safetensors", points)
    lora = _config_dict(config)
    if base is not None:
        lora["base_model_name_or_path"] = base
    write_json(folder / "curve_config.json", {"format": FORMAT, "curve": dataclasses.asdict(spec), "lora": lora})


def load_curve(folder: str | Path) -> tuple[peft.LoraConfig, CurveSpec, ControlPoints]:
    """Read a curve folder; raises UserError for missing or broken parts."""

    folder = Path(folder)
    if not (folder / "curve_config.json").is_file():
        raise UserError(f"{folder}: expected a curve folder, found no curve_config.json")
    values = read_json(folder / "curve_config.json")
    try:
        if values["format"] != FORMAT:
            raise UserError(f"{folder}: curve format {values['format']!r}; this version reads format {FORMAT}")
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


def export_adapter(config: peft.LoraConfig, adapter: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write one adapter as an ordinary PEFT folder, which `peft.PeftModel.from_pretrained` loads."""
    folder = Path(folder)
    write_tensors(folder / "adapter_model.safetensors", adapter)
    config = copy.deepcopy(config)
    config.inference_mode = True
    if config.task_type == peft.TaskType.SEQ_CLS and not config.modules_to_save:
        config.modules_to_save = ["classifier", "score"]
    write_json(folder / "adapter_config.json", _config_dict(config))
