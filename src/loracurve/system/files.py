"""Files: atomic writes and JSON. No pickle is read or written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loracurve.system.errors import UserError
from loracurve.system.paths import file_size, flush, make_folder, opened, read_text, reason, temporary

__all__ = ["atomic_write", "file_hash", "once", "read_json", "write_json"]

LARGEST_JSON = 2**28


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `path`, flush it to disk and rename it, so that `path` is old or whole.

    The names of the file and of new folders are flushed too. All files get the permissions that the process gives to
    new ones, whatever a library would give. A killed process leaves `.NAME.PROCESS.XXXXXXXX.tmp`, which nothing reads
    and `folders.locked` removes.

    Raises:
        UserError: no space left, or the place cannot be written.
    """
    unfinished = temporary(path)
    try:
        make_folder(path.parent)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        write(unfinished)
        if stat.S_IMODE(os.stat(unfinished).st_mode) != mode:
            os.chmod(unfinished, mode)
        flush(unfinished)
        os.replace(unfinished, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path}: {reason(error)}; free some space or choose another folder with --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN is refused because JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    atomic_write(path, lambda p: p.write_text(text))


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError if it is missing, broken, too deep or larger than `LARGEST_JSON`."""
    if file_size(path) > LARGEST_JSON:
        raise UserError(f"{path}: expected a JSON file of at most {LARGEST_JSON >> 20} MiB, found a larger one")
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def file_hash(path: Path, expected: str) -> str:
    """SHA-256 of a file's bytes; raises UserError, which says what was `expected`, where it cannot be read."""
    digest = hashlib.sha256()
    with opened(path, expected) as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object each of whose fields stands once, for `object_pairs_hook`; raises ValueError for others."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name in found if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"the field {twice!r} stands twice")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
