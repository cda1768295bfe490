"""Named tensors as safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loracurve.system.errors import UserError
from loracurve.system.files import atomic_write

__all__ = ["UNREADABLE", "read_tensors", "write_tensors"]

# What safetensors and PEFT raise for headers that are no headers, dtypes that torch lacks, files that cannot be mapped,
# and configs of other types.
UNREADABLE = (
    ArithmeticError, AttributeError, KeyError, MemoryError, OSError, RecursionError, RuntimeError, SafetensorError,
    TypeError, ValueError,
)  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    atomic_write(path, lambda p: save_file(held, p, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: expected a safetensors file, found none")
    try:
        return load_file(path)
    except UNREADABLE as error:
        raise UserError(f"{path}: damaged safetensors file ({error})") from error
