"""The layout of the library: each package imports only itself and those below it, no two files import each other in a
circle, and what is imported stands at the top of a file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.places import ROOT

SOURCE = ROOT / "src" / "loracurve"

# From the ground up. A package imports itself and those before it in this tuple.
ORDER = (
    "system",
    "curve",
    "tasks",
    "model",
    "inference",
    "training",
    "landscape",
    "report",
    "runs",
    "baselines",
    "bench",
    "serving",
)

# Beside the order: may import up to the named package, and nothing imports it. What it holds is reached by its name.
EXPERIMENTAL = {"experimental": "inference"}

# Files above all packages. They may import anything, and no package imports them.
TOP = ("__init__", "__main__", "cli", "commands")

# Files that load on demand, and so may import inside a function: the commands and the public names (help and a mistyped
# option answer before torch is there), and the HTTP app, which needs the extra `serve`.
ON_DEMAND = {
    "commands.py": "loracurve",
    "__init__.py": "loracurve",
    "serving/command.py": "loracurve.serving",
}


@dataclass(frozen=True)
class Import:
    """One imported module of our own."""

    file: Path
    line: int
    module: str
    inside: bool
    """whether it stands in a function"""


def modules_of(root: Path) -> dict[str, Path]:
    """Files below the package's folder by the module that they are."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(("loracurve", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imports_of(path: Path, root: Path, known: dict[str, Path]) -> Iterator[Import]:
    """What a file imports of us: at its top, in functions, in classes and under TYPE_CHECKING."""

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            within = inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                for name in child.names:
                    if name.name.split(".")[0] == "loracurve":
                        yield Import(path, child.lineno, name.name, inside)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:  # relative
                    package = ("loracurve", *path.relative_to(root).parent.parts)
                    base = ".".join((*package[: len(package) - child.level + 1], *([base] if base else [])))
                if base.split(".")[0] == "loracurve":
                    named = (f"{base}.{name.name}" for name in child.names)
                    for module in dict.fromkeys(name if name in known else base for name in named):
                        yield Import(path, child.lineno, module, inside)
            elif called := _imported_by_name(child):
                yield Import(path, child.lineno, called, inside)  # type: ignore[attr-defined]
            yield from visit(child, within)

    yield from visit(ast.parse(path.read_text(), str(path)), False)


def _imported_by_name(node: ast.AST) -> str:
    """The module of `import_module("loracurve...")`."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        given = node.args[0] if node.args else None
        if isinstance(given, ast.Constant) and str(given.value).split(".")[0] == "loracurve":
            return str(given.value)
    return ""


def package_of(module: str) -> str:
    """The package of a module, or the name of a file at the top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def violations(root: Path) -> list[str]:
    """What breaks the layout, a line each: file, line, and the rule."""
    known = modules_of(root)
    found = [i for path in known.values() for i in imports_of(path, root, known)]
    names = {path: module for module, path in known.items()}
    out = []
    for i in found:
        here, there, place = package_of(names[i.file]), package_of(i.module), f"{i.file.relative_to(root)}:{i.line}"
        if i.inside and not i.module.startswith(ON_DEMAND.get(i.file.relative_to(root).as_posix(), "nowhere")):
            out.append(f"{place} imports {i.module} inside a function; import it at the top of the file")
        if here in TOP:
            continue
        if here != there:
            if there in TOP:
                out.append(f"{place} imports {i.module}, which stands above all packages")
            elif there in EXPERIMENTAL:
                out.append(f"{place} imports {i.module}, which nothing may import")
            elif not _below(there, here):
                out.append(f"{place} imports {i.module}, but {there} is not below {here}")
    return out + [f"a circle: {' -> '.join(lines)}" for lines in circles(found, names, root)]


def _below(there: str, here: str) -> bool:
    if there not in ORDER or here not in (*ORDER, *EXPERIMENTAL):
        return False
    upto = ORDER.index(EXPERIMENTAL[here]) + 1 if here in EXPERIMENTAL else ORDER.index(here)
    return ORDER.index(there) < upto


def circles(found: list[Import], names: dict[Path, str], root: Path) -> list[list[str]]:
    """One circle through each group of files that all reach each other, as places of the imports that make it."""
    edges: dict[str, dict[str, str]] = {module: {} for module in names.values()}
    for i in found:
        here = names[i.file]
        if i.module in edges and i.module != here and here != "loracurve":
            edges[here].setdefault(i.module, f"{i.file.relative_to(root)}:{i.line}")
    out: list[list[str]] = []
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> None:
        if module in path:
            around = path[path.index(module) :]
            out.append([edges[a][b] for a, b in zip(around, [*around[1:], module], strict=True)])
        elif module not in done:
            for other in edges[module]:
                follow(other, [*path, module])
            done.add(module)

    for module in edges:
        follow(module, [])
    return out


def test_every_package_has_its_place() -> None:
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == {*ORDER, *EXPERIMENTAL}


def test_imports_follow_the_order() -> None:
    found = violations(SOURCE)
    assert not found, "\n" + "\n".join(found)


def test_tests_share_helpers_and_import_no_other_test() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in named if n.split(".")[-1].startswith(("test_", "tests"))], f"{path}:{node.lineno}"


# ---- the check itself


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


GOOD = {
    "__init__.py": "def __getattr__(name):\n    from loracurve.runs import fit\n",
    "cli.py": "from loracurve import commands\n",
    "commands.py": "import loracurve.curve.spec\ndef fit():\n    from loracurve.runs.fit import fit_run\n",
    "system/errors.py": "import os\n",
    "curve/spec.py": "from loracurve.system.errors import UserError\n",
    "runs/fit.py": "from loracurve.curve import spec\nfrom . import run\nfrom .run import Run\n",
    "runs/run.py": "def late():\n    import torch\n",
    "experimental/tunnel.py": "from loracurve.inference.config import TunnelConfig\n",
    "inference/config.py": "",
    "serving/app.py": "import fastapi\n",
    "serving/command.py": "def serve():\n    from loracurve.serving.app import make_app\n",
}


def test_a_good_tree_is_good(tmp_path: Path) -> None:
    assert violations(tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"curve/spec.py": "import os\nfrom loracurve.runs.run import Run\n"},
            "curve/spec.py:2 imports loracurve.runs.run, but runs is not below curve",
        ),
        (
            {"system/files.py": "if TYPE_CHECKING:\n    import loracurve.curve.spec as spec\n"},
            "system/files.py:2 imports loracurve.curve.spec, but curve is not below system",
        ),
        (
            {"curve/spec.py": "from ..tasks import task\n", "tasks/task.py": ""},
            "curve/spec.py:1 imports loracurve.tasks.task, but tasks is not below curve",
        ),
        (
            {"runs/run.py": "def late():\n    from loracurve.curve.spec import CurveSpec\n"},
            "runs/run.py:2 imports loracurve.curve.spec inside a function; import it at the top of the file",
        ),
        (
            {"runs/run.py": "class A:\n    def late(self):\n        import_module('loracurve.curve.spec')\n"},
            "runs/run.py:3 imports loracurve.curve.spec inside a function; import it at the top of the file",
        ),
        (
            {"serving/command.py": "def serve():\n    from loracurve.runs.run import Run\n"},
            "serving/command.py:2 imports loracurve.runs.run inside a function; import it at the top of the file",
        ),
        ({"serving/app.py": "from loracurve import cli\n"}, "loracurve.cli, which stands above all packages"),
        (
            {"serving/app.py": "import loracurve\n"},
            "serving/app.py:1 imports loracurve, which stands above all packages",
        ),
        (
            {"runs/run.py": "from loracurve.experimental.tunnel import Tunnel\n"},
            "runs/run.py:1 imports loracurve.experimental.tunnel, which nothing may import",
        ),
        (
            {"experimental/tunnel.py": "from loracurve.runs.run import Run\n"},
            "experimental/tunnel.py:1 imports loracurve.runs.run, but runs is not below experimental",
        ),
        ({"runs/run.py": "from loracurve.runs.fit import f\n"}, "a circle: runs/fit.py:2 -> runs/run.py:1"),
        (
            {"cli.py": "from loracurve import commands\n", "commands.py": "from loracurve.cli import main\n"},
            "a circle: cli.py:1 -> commands.py:1",
        ),
        ({"other/x.py": "from loracurve.curve import spec\n"}, "other/x.py:1 imports loracurve.curve.spec, but"),
    ],
)
def test_what_breaks_the_layout_is_reported(files: dict[str, str], message: str, tmp_path: Path) -> None:
    (found,) = violations(tree(tmp_path, GOOD | files))
    assert message in found
