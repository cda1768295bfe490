"""Files: atomic writes, JSON and safetensors, curve folders, PEFT adapter folders. No pickle is read or written.

A curve folder holds `curve_config.json` and `control_points.safetensors` (PEFT parameter names, leading dimension K).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loracurve.system.errors import UserError

__all__ = ["atomic_write", "flush", "read_json", "read_table", "read_tensors", "records", "write_json", "write_tensors"]


# What safetensors and PEFT raise for headers that are no headers, dtypes that torch lacks, files that cannot be mapped,
# and configs of other types.
UNREADABLE = (
    ArithmeticError, AttributeError, KeyError, MemoryError, OSError, RecursionError, RuntimeError, SafetensorError,
    TypeError, ValueError,
)  # fmt: skip

LARGEST_JSON = 2**28

# Bytes of a table for each byte of its Parquet file.
LARGEST_RATIO = 1000


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `path`, flush it to disk and rename it, so that `path` is old or whole.

    The names of the file and of new folders are flushed too. A killed process leaves `.NAME.PROCESS.XXXXXXXX.tmp`,
    which nothing reads and `locking.locked` removes.

    Raises:
        UserError: no space left, or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        _make_folder(path.parent)
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write {path}: {reason}; free some space or choose another folder with --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN is refused because JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    atomic_write(path, lambda p: p.write_text(text))


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError if it is missing, broken, too deep or larger than `LARGEST_JSON`."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: expected a file, found none")
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path}: expected a JSON file of at most {LARGEST_JSON >> 20} MiB, found a larger one")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a data frame as JSON has them: None for NaN, which pandas makes of missing numbers."""
    rows: list[dict[str, Any]] = frame.to_dict("records")
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]


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


def read_table(path: Path) -> pa.Table:
    """Read a Parquet file; raises UserError if it is damaged, or unfolds to far more than lies on the disk."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: expected a Parquet file, found none")
        with pq.ParquetFile(path, thrift_string_size_limit=2**26, thrift_container_size_limit=2**20) as file:
            about, size = file.metadata, path.stat().st_size
            groups = [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]
            # Each row has an id of its own, which compression cannot make away with.
            if about.num_rows > 8 * size or not 0 <= sum(groups) <= LARGEST_RATIO * size:
                raise UserError(f"{path}: {about.num_rows} rows of {sum(groups)} bytes do not fit into {size} bytes")
            return file.read()
    except UserError:
        raise
    except (pa.ArrowException, MemoryError, OSError, OverflowError, ValueError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())[:160]}); make it again") from error
