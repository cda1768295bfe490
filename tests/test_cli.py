"""The command line: overview, help of every command, switches and lists."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import loracurve
from loracurve.cli import COMMANDS, _command_parser, main, spell_out
from loracurve.runs.config import RunConfig


def test_version_and_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == loracurve.__version__
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        said = capsys.readouterr()
        assert all(re.search(rf"^  {name} +\w", said.out, flags=re.MULTILINE) for name in COMMANDS)
        assert said.err == ""


def documented(kind: type) -> dict[str, str]:
    """The string behind each attribute of a dataclass and of those it inherits from, by the attribute's name."""
    found: dict[str, str] = {}
    for part in reversed(kind.__mro__[:-1]):
        (body,) = ast.parse(inspect.getsource(part)).body
        assert isinstance(body, ast.ClassDef)
        for statement, after in pairwise(body.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(statement.target, ast.Name)
                found[statement.target.id] = str(ast.literal_eval(after.value))
    return found


def options_of(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every option of a dataclass and of those inside it as the command line names it, and what it says of it."""
    hints, texts = typing.get_type_hints(kind), documented(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            yield from options_of(typing.cast(type, inner), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", texts[field.name]


# Options of other programs, which messages and calls of ours name, and what stands for any option.
ELSEWHERE = {
    "pip": {"--force-reinstall", "--no-deps"},
    "git": {"--error-unmatch", "--porcelain"},
    "accelerate": {"--fsdp_version", "--use_fsdp"},
    "vllm": {"--max-logprobs", "--return-tokens-as-token-ids"},
    "lm_eval": {"--model", "--model_args", "--tasks"},
    "": {"--key"},
}

NAMES = "|".join(COMMANDS)


def texts_of_sources() -> Iterator[tuple[str, str]]:
    """Every text in the code with its place; of one that is put together, the parts that stand there."""
    for file in sorted(Path(loracurve.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{file.name}:{node.lineno}", node.value


def test_every_option_that_a_text_names_is_there() -> None:
    """Where it names the command too (`share: --base`, `evaluate --task`, `loracurve fit X --out`), of that one."""
    known = {name: {o for a in _command_parser(name)._actions for o in a.option_strings} for name in COMMANDS}
    every = {"--version"}.union(*known.values(), *ELSEWHERE.values())
    with_dashes = {option.replace("_", "-") for option in every}
    of_commands = []
    for place, text in texts_of_sources():
        for found in re.finditer(r"(?<![\w-])--[a-zA-Z][\w.-]*\w", text):
            assert found[0] in every | with_dashes, f"{place}: {found[0]}"
            if named := re.search(rf"loracurve ({NAMES})\b[^.;,]* $|\b({NAMES}):? $", text[: found.start()]):
                command = named[1] or named[2]
                assert found[0] in known[command], f"{place}: {command} has no {found[0]}"
                of_commands.append((command, found[0]))
    assert {("share", "--base"), ("share", "--without_unknowns"), ("evaluate", "--task")} <= set(of_commands)


def test_help_of_fit_lists_and_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    said = capsys.readouterr().out
    expected = dict(options_of(RunConfig))
    assert len(expected) > 60
    for option, text in expected.items():
        found = re.search(rf"^  --{re.escape(option)}\b(.*?)(?=^  -|\Z)", said, flags=re.MULTILINE | re.DOTALL)
        assert found, f"--{option} is not listed"
        assert "".join(text.split()) in "".join(found[1].split()), f"--{option} is not explained: {found[0]}"
    for option in ("config", "out", "resume"):
        assert re.search(rf"^  --{option}\b", said, flags=re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "fit"])
def test_help_of_commands_lists_every_parameter(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    hints = typing.get_type_hints(COMMANDS[name].run)
    for parameter in inspect.signature(COMMANDS[name].run).parameters.values():
        kind = hints[parameter.name]
        for option in dict(options_of(kind)) if dataclasses.is_dataclass(kind) else [parameter.name]:  # type: ignore[arg-type]
            # What a command cannot do without may stand first, without its name.
            pattern = rf"^  (--)?{option}\b" if parameter.default is parameter.empty else rf"^  --{option}\b"
            assert re.search(pattern, said, flags=re.MULTILINE), f"{option} is not listed by {name} --help"


@pytest.mark.parametrize(
    ("arguments", "switch"), [(["quickstart"], "resume"), (["export", "run", "--out", "folder"], "best")]
)
def test_switches_take_no_value(arguments: list[str], switch: str) -> None:
    from loracurve.cli import _command_parser
    from loracurve.system.options import parse

    parser = _command_parser(arguments[0])
    assert parse(parser, arguments[1:])[switch] is False
    assert parse(parser, [*arguments[1:], f"--{switch}"])[switch] is True


def test_lists_and_flags_are_spelled_out() -> None:
    found = spell_out(["--adapters", "a", "b", "--best", "--t", "1"], ["--adapters"], ["--best"])
    assert found == ['--adapters=["a", "b"]', "--best=true", "--t", "1"]
    assert spell_out(["--best", "false", "--x=1"], [], ["--best"]) == ["--best", "false", "--x=1"]
    assert spell_out(["--adapters", '["a"]'], ["--adapters"], []) == ['--adapters=["a"]']
