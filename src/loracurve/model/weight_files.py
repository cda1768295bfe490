"""How much memory a base model's weights will take, by the headers of its files."""

from __future__ import annotations

import json
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from loracurve.model.config import ModelConfig
from loracurve.system.paths import is_file, is_folder
from loracurve.system.tensors import UNREADABLE

__all__ = ["weights_on_disk"]


# Bytes of a number, by safetensors' names; what is packed is left as it is.
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def weights_on_disk(config: ModelConfig) -> int | None:
    """Bytes of a base's weights in the dtype that they will be held in; None where no safetensors files on this machine
    say so, or where the weights are packed while they are loaded."""
    if config.quantise != "none":
        return None
    with suppress(*UNREADABLE):  # who loads the files says what is wrong with them
        files = _files(config)
        return sum(_bytes(path, config.dtype) for path in files) if files else None
    return None


def _files(config: ModelConfig) -> list[Path]:
    index = _file(config, "model.safetensors.index.json")
    if index is None:
        whole = _file(config, "model.safetensors")
        return [] if whole is None else [whole]
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = [_file(config, name) for name in names]
    return [] if None in found else [path for path in found if path is not None]


def _file(config: ModelConfig, name: str) -> Path | None:
    if is_folder(config.name):
        return Path(config.name) / name if is_file(Path(config.name) / name) else None
    found = try_to_load_from_cache(config.name, name, revision=config.revision)
    return Path(found) if isinstance(found, str) else None


def _bytes(path: Path, dtype: str) -> int:
    total = 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            stored = _FLOATS.get(part.get_dtype())
            size = 1 if stored is None else stored if dtype == "auto" else getattr(torch, dtype).itemsize
            total += prod(part.get_shape()) * size
    return total
