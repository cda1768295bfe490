"""Files are flushed to the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loracurve.system import files


def test_names_of_files_and_new_folders_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr("loracurve.system.files.os.fsync", recorded)
    files.write_json(tmp_path / "a" / "b" / "c.json", 1)
    assert flushed[:2] == [str(tmp_path), str(tmp_path / "a")]
    assert Path(flushed[2]).parent == tmp_path / "a" / "b" and flushed[2].endswith(".tmp")
    assert flushed[3] == str(tmp_path / "a" / "b") and len(flushed) == 4
