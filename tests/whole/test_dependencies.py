"""Dependencies: declared where they are imported, pinned within their ranges, of licences that go with Apache-2.0."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

import pytest
from helpers.places import ROOT
from helpers.processes import ran
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
NOT_TESTED = {"tracking"}


"""Extras that the tests' environment lacks, so that nothing of them is pinned."""


INSTALLERS = {"pip", "setuptools", "wheel", "loracurve"}
# Licences of which every part may be used and passed on with software under Apache-2.0. MPL-2.0 binds changes to its
# own files alone. NVIDIA's packages, which torch brings for its GPUs, are not open, but may be used.
FREE = re.compile(
    r"\b(MIT|0?BSD|Apache|ISCL?|PSF|Python Software Foundation|CNRI-Python|Zlib|CC0|BSL-1\.0|LLVM-exception|HPND|"
    r"Public Domain|MPL-2\.0|MPL 2\.0|NVIDIA)\b",
    re.IGNORECASE,
)
COPYLEFT = {"ivon-opt"}


"""Under the GPL: only in an extra of their own, imported by one baseline."""


def pins() -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def wanted(names: set[str]) -> list[Requirement]:
    """What the library needs, with these extras."""
    return [Requirement(r) for r in PROJECT["dependencies"] + [r for n in sorted(names) for r in EXTRAS[n]]]


def closure(requirements: list[Requirement]) -> dict[str, Distribution]:
    """What of the requirements, and of theirs in turn, is installed, by name."""
    found: dict[str, Distribution] = {}
    todo = [(r, "") for r in requirements]
    seen = set()
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if name == "loracurve" or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        for own in ("", *requirement.extras):
            if (name, own) in seen:
                continue
            seen.add((name, own))
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:
                continue
            todo += [(Requirement(text), own) for text in found[name].requires or []]
    return found


def licence(package: Distribution) -> str:
    """Its SPDX expression, else its classifiers, else the first line of whatever it says."""
    about = package.metadata
    if expression := about.get("License-Expression"):
        return str(expression)
    classifiers = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License :: ")]
    named = [c for c in classifiers if c != "OSI Approved"]
    return " AND ".join(named) or (about.get("License") or "none").strip().splitlines()[0]


def is_free(text: str) -> bool:
    """Whether every part of a licence expression is one of those that may be used."""
    alternatives = [part.split(" AND ") for part in text.split(" OR ")]
    return any(all(FREE.search(p) and not re.search(r"\bA?L?GPL", p) for p in parts) for parts in alternatives)


def test_licence_expressions_are_read() -> None:
    for text in ("MIT", "BSD-3-Clause AND 0BSD AND Zlib", "GPL-3.0 OR Apache-2.0", "ISC License (ISCL)"):
        assert is_free(text)
    for text in ("GPLv3+", "LGPL-2.1", "AGPL-3.0", "none", "MIT AND GPL-2.0", "LIMITED"):
        assert not is_free(text)


def test_licences_of_everything_that_may_be_imported() -> None:
    needed = closure(wanted(set()))
    assert {"torch", "transformers", "numpy"} <= set(needed)
    everything = closure(wanted(set(EXTRAS)))
    for name in EXTRAS:
        if COPYLEFT & set(closure([Requirement(r) for r in EXTRAS[name]])):
            assert name == "ivon"
    wrong = {n: licence(p) for n, p in everything.items() if not is_free(licence(p)) and n not in COPYLEFT}
    assert not wrong
    assert not COPYLEFT & set(needed)


def test_pins_lie_in_the_ranges_of_the_project() -> None:
    found = pins()
    for requirement in wanted(set(EXTRAS) - NOT_TESTED):
        if requirement.name != "loracurve":
            version = found.get(canonicalize_name(requirement.name))
            assert version and requirement.specifier.contains(version), f"{requirement}, but constraints have {version}"


def test_pins_are_what_is_installed() -> None:
    """Only in the environment that `make` makes."""
    if not (Path(sys.prefix) / ".ready").is_file():
        pytest.skip("not the environment that constraints.txt describes")
    installed = {canonicalize_name(d.name): d.version.partition("+")[0] for d in distributions()}
    found = pins()
    different = {n: (v, found.get(n)) for n, v in installed.items() if n not in INSTALLERS and found.get(n) != v}
    assert not different, "installed version, pinned version"


def test_imports_are_declared_and_what_is_declared_is_imported() -> None:
    pytest.importorskip("deptry")
    command = [sys.executable, "-m", "deptry", "src", "--no-ansi"]
    said = ran(command, cwd=ROOT)
    assert said.returncode == 0, said.stderr


def test_the_library_loads_without_its_extras() -> None:
    """Optional packages are imported where they are used."""
    needed = {canonicalize_name(n) for n in closure(wanted(set()))}
    optional = closure([Requirement(r) for name in EXTRAS for r in EXTRAS[name]])
    modules = sorted({m for n, p in optional.items() if n not in needed for m in modules_of(p)})
    assert {"ray", "trl", "fastapi", "ivon"} <= set(modules)
    code = f"import sys; sys.modules.update(dict.fromkeys({modules})); import loracurve.cli, loracurve.training.trainer"
    said = ran([sys.executable, "-c", code])
    assert said.returncode == 0, said.stderr


def modules_of(package: Distribution) -> set[str]:
    """Names under which a distribution can be imported."""
    tops = {f.parts[0] for f in package.files or [] if f.suffix == ".py" and len(f.parts) > 1}
    return {t for t in tops if t.isidentifier()}
