"""Files: atomic writes and JSON. No pickle is read or written."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loracurve.system.errors import UserError

__all__ = ["atomic_write", "flush", "read_json", "write_json"]

LARGEST_JSON = 2**28


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `path`, flush it to disk and rename it, so that `path` is old or whole.

    The names of the file and of new folders are flushed too. A killed process leaves `.NAME.PROCESS.XXXXXXXX.tmp`,
    which nothing reads and `folders.locked` removes.

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
