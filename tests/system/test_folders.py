"""Locks of folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loracurve.system.errors import UserError
from loracurve.system.folders import LOCK, locked, results_file, results_folder


def test_locks_end_in_order(tmp_path: Path) -> None:
    in_use = f"in use by process {os.getpid()}"
    with locked(tmp_path / "a"), locked(tmp_path / "b"), pytest.raises(UserError, match=in_use), locked(tmp_path / "a"):
        pass
    assert not list(tmp_path.rglob(LOCK))
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UserError, match="cannot write into .*/c: "), locked(tmp_path / "c"):
        pass


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with results_folder(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
    with results_file(tmp_path / "c" / "page.html") as file:
        assert file.parent.is_dir()
    assert not [*tmp_path.iterdir()]
    with results_folder(tmp_path / "a" / "b") as folder:
        (folder / "kept").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["kept"]


@pytest.mark.parametrize(("resume", "advice"), [(None, "--out"), (False, "--out, or go on with it by --resume")])
def test_results_are_not_put_beside_others(resume: bool | None, advice: str, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(UserError, match=f"exists already; choose another {advice}$"), results_folder(tmp_path, resume):
        pass
    with results_folder(tmp_path, resume=True):
        assert (tmp_path / LOCK).is_file()


def test_a_file_that_is_there_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "page").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("page", "link"):
        with pytest.raises(UserError, match=f"{name} exists already; choose another --html"):
            results_file(tmp_path / name, "--html").__enter__()
    with results_file(tmp_path / "page", replace=True):
        pass
    with pytest.raises(UserError, match="exists already"), results_file(tmp_path, replace=True):
        pass
