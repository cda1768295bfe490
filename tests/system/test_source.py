"""Which code made a result."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from loracurve.system.source import source


def _git(folder: Path, *arguments: str) -> str:
    own = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", "-C", str(folder), *own, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_counts_where_the_package_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_CEILING_DIRECTORIES", raising=False)
    package = tmp_path / "src" / "p"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1\n")
    _git(tmp_path, "init", "-q")
    # Inside a checkout that does not hold it, as an environment often is.
    first = source.__wrapped__(package)
    assert (first.commit, first.changed) == (None, False)

    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "x")
    (tmp_path / "notes.txt").write_text("not part of the package")
    clean = source.__wrapped__(package)
    assert (clean.commit, clean.changed, clean.sha256) == (_git(tmp_path, "rev-parse", "HEAD"), False, first.sha256)

    (package / "__init__.py").write_text("a = 2\n")
    other = source.__wrapped__(package)
    assert (other.commit, other.changed) == (clean.commit, True) and other.sha256 != clean.sha256
    (package / "__init__.py").write_text("a = 1\n")
    (package / "more.py").write_text("")
    assert source.__wrapped__(package).changed


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source.__wrapped__(tmp_path).commit is None
