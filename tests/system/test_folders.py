"""Locks of folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loracurve.system.errors import UserError
from loracurve.system.folders import LOCK, locked


def test_locks_end_in_order(tmp_path: Path) -> None:
    in_use = f"in use by process {os.getpid()}"
    with locked(tmp_path / "a"), locked(tmp_path / "b"), pytest.raises(UserError, match=in_use), locked(tmp_path / "a"):
        pass
    assert not list(tmp_path.rglob(LOCK))
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UserError, match="c/.lock: "), locked(tmp_path / "c"):
        pass
