"""Named tensors as safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from loracurve.system.errors import UserError
from loracurve.system.files import atomic_write
from loracurve.system.paths import file_size, opened

__all__ = ["MOST_TENSORS", "UNREADABLE", "read_tensors", "write_tensors"]

# What safetensors and PEFT raise for headers that are no headers, dtypes that torch lacks, files that cannot be mapped,
# and configs of other types.
UNREADABLE = (
    ArithmeticError, AttributeError, KeyError, MemoryError, OSError, RecursionError, RuntimeError, SafetensorError,
    TypeError, ValueError,
)  # fmt: skip


MOST_TENSORS = 100_000
"""in one file: adapters on every expert of the largest mixtures have 90,000 factors"""

_HEADER_BYTES = 400  # for each tensor, with its name

# In the order in which the library writes them.
_DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    atomic_write(path, lambda p: _save(held, p))


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """What `safetensors.torch.save_file` writes, without the temporary file of a name of its own that it leaves beside
    `path` when it is killed."""
    if others := {str(t.dtype) for t in tensors.values()}.difference(map(str, _DTYPES)):
        raise UserError(f"cannot write {path.name}: expected ordinary dtypes, found {', '.join(sorted(others))}")
    kinds = list(_DTYPES)
    order = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name.encode()))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)


def read_tensors(path: Path, most: int = MOST_TENSORS) -> dict[str, Tensor]:
    """Read a safetensors file; raises UserError if it is missing, damaged, or has more than `most` tensors."""
    with opened(path, "a safetensors file") as file:
        length = int.from_bytes(file.read(8), "little")
        # The library parses up to 100 MB of header, which takes minutes.
        if length > min(_HEADER_BYTES * most, file_size(path)):
            raise UserError(
                f"{path}: damaged safetensors file: expected a header of at most {_HEADER_BYTES * most} bytes, within "
                f"the file, found one of {length}"
            )
        # Each has a shape and two offsets in brackets, however its names are written.
        if (count := file.read(length).count(b"[") // 2) > most:
            raise UserError(f"{path}: expected at most {most} tensors, found {count}")
    try:
        return load_file(path)
    except UNREADABLE as error:
        raise UserError(f"{path}: damaged safetensors file ({error})") from error
