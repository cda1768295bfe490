"""What README and documents promise exists: commands, options, configurations, names, links."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.documents import DOCUMENTS, commands, fenced
from helpers.places import ROOT

import loracurve


def test_readme_commands_exist() -> None:
    from loracurve.cli import COMMANDS

    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = commands()
    assert {line[1] for line in named if line[0] == "make"} >= {"quickstart", "test"}
    for program, verb, *_ in named:
        assert program in ("make", "pip", "loracurve"), f"README shows an unknown command {program}"
        if program == "make":
            assert verb in targets, f"README shows make {verb}, the Makefile has {sorted(targets)}"
        if program == "loracurve":
            assert verb in COMMANDS, f"README shows loracurve {verb}, the command has {sorted(COMMANDS)}"


def test_readme_lists_every_command() -> None:
    from loracurve.cli import COMMANDS

    assert {line[1] for line in commands() if line[0] == "loracurve"} == set(COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_show_commands_and_options_that_exist(document: str) -> None:
    from loracurve.cli import COMMANDS, _command_parser

    text = (ROOT / document).read_text()
    inline = [span.split() for span in re.findall(r"`(loracurve [a-z][^`]*)`", text)]
    for program, verb, *words in [*commands(text), *inline]:
        if program != "loracurve" or not verb.islower():
            continue
        assert verb in COMMANDS, f"{document} shows loracurve {verb}, the command has {sorted(COMMANDS)}"
        parser = _command_parser(verb)
        known = {option for action in parser._actions for option in action.option_strings}
        known |= {"--tables-only"} if verb == "bench" else set()
        for word in words:
            option = word.split("=")[0]
            assert not option.startswith("--") or option in known, f"{document}: loracurve {verb} has no {option}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_show_configurations_that_parse(document: str, tmp_path: Path) -> None:
    from loracurve.bench.suite import load_suite
    from loracurve.runs.config import load_config

    for block in fenced("yaml", (ROOT / document).read_text()):
        (tmp_path / "shown.yaml").write_text(block)
        (load_suite if "\nmethods:" in block else load_config)(tmp_path / "shown.yaml")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_show_python_names_that_exist(document: str) -> None:
    for block in fenced("python", (ROOT / document).read_text()):
        if block.startswith("{% include"):
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loracurve"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    submodule = f"{node.module}.{name.name}"
                    assert hasattr(module, name.name) or importlib.import_module(submodule), f"{document}: {submodule}"
        for path in re.findall(r"\blc((?:\.\w+)+)", block):
            found: object = loracurve
            for name in path[1:].split("."):
                found = getattr(found, name)


def test_site_lists_every_page() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(f"docs/{name}" for name in listed) == [name for name in DOCUMENTS if name.startswith("docs/")]


def test_the_python_of_the_quickstart_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names stand for a tiny model, made rows and adapters that PEFT saved."""
    import peft
    import torch
    from helpers.made_runs import base_folder, data_folder

    from loracurve.model.base_model import load_base

    monkeypatch.chdir(tmp_path)
    base = str(base_folder(tmp_path / "base", "llama"))
    data_folder(tmp_path / "my-data", "label")
    for name in "abc":
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        peft.get_peft_model(load_base(base)[0], config).save_pretrained(f"adapters/{name}")
    space: dict[str, Any] = {}
    for block in fenced("python", (ROOT / "docs/quickstart.md").read_text()):
        if "base = " not in block and "base" in space:  # a second curve needs a base that is not wrapped yet
            space["base"] = load_base(base)[0]
        code = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", base).replace("steps=300", "steps=2")
        exec(compile(code, "quickstart.md", "exec"), space)
    assert torch.allclose(space["predictive"].probs.sum(1), torch.ones(17, dtype=torch.float64))
    assert (tmp_path / "adapters" / "middle" / "adapter_model.safetensors").exists()
    assert space["model"].spec.segments == 4


SOURCE = ROOT / "src" / "loracurve"
# Every module and package by its last name, by which documents call it: `bezier.coefficients`, `curve.bezier`.
MODULES: dict[str, list[str]] = {"loracurve": ["loracurve"]}
for path in sorted(SOURCE.rglob("*.py")):
    parts = ("loracurve", *path.relative_to(SOURCE).with_suffix("").parts)
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    if parts[-1] not in ("loracurve", "__main__"):
        MODULES.setdefault(parts[-1], []).append(".".join(parts))


def is_there(named: str) -> bool:
    """Whether a dotted name is a file of ours, or something that a module of this name holds."""
    first, *names = named.split(".")
    if names == ["py"]:
        return any((SOURCE.parent / (m.replace(".", "/") + ".py")).is_file() for m in MODULES.get(first, []))
    if names in (["json"], ["yaml"], ["safetensors"]):
        return True  # a file of a run
    for module in MODULES.get(first, []):
        found: Any = importlib.import_module(module)
        for name in names:
            inside = f"{found.__name__}.{name}" if isinstance(found, ModuleType) else ""
            if not hasattr(found, name) and any(inside in known for known in MODULES.values()):
                importlib.import_module(inside)
            if not hasattr(found, name):
                break
            found = getattr(found, name)
        else:
            return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_existing_functions_and_files(document: str) -> None:
    from loracurve.cli import _command_parser

    text = (ROOT / document).read_text()
    options = {action.dest for action in _command_parser("fit")._actions}
    for named in re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_.]+)(?:\(\))?`", text):
        first = named.split(".")[0]
        ours = first in MODULES or any(option.startswith(f"{first}.") for option in options)
        assert not ours or named in options or is_there(named), f"{document} names {named}, which does not exist"
    for file in re.findall(r"\btests/[\w/]+\.py", text):
        assert (ROOT / file).is_file(), f"{document} names {file}, which does not exist"
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), f"{document} links to {target}"


def test_no_tracked_file_names_a_machine_path() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    # Put together here, or this file would be found itself.
    machine = re.compile(rb"(?<![\w.])/(?:work|root)" + b"/")
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file():
            assert not machine.search(path.read_bytes()), f"{name} names a path of one machine"
