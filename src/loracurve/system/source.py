"""Which code made a result: a hash of the package's files, and the commit of the checkout that they lie in."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Source", "source"]

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Source:
    """The code of the package."""

    sha256: str
    """of the names and contents of its Python and YAML files"""
    commit: str | None
    """that its git checkout stands at; None for an installed package"""
    changed: bool
    """whether files of the package differ from that commit"""


@cache
def source(package: Path = _PACKAGE) -> Source:
    """What `package` (a folder) is now, looked up once in a process."""
    found = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".yaml")):
        found.update(f"{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    # An environment can lie inside a checkout that knows nothing of the packages in it.
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    commit = _git(package, "rev-parse", "HEAD") if tracked else None
    changed = commit is not None and bool(_git(package, "status", "--porcelain", "--", "."))
    return Source(found.hexdigest(), commit, changed)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where there is no git, or it says no."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
