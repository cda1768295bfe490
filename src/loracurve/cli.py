"""The command `loracurve`: its sub-commands are functions (`commands` and others), their options the signatures.

Exit codes: 0 done, 2 the input is wrong (one line on standard error), 1 a fault of ours.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import docstring_parser

from loracurve import __version__
from loracurve.commands import (
    bench,
    calibrate,
    evaluate,
    export,
    fit,
    generate,
    predict,
    quickstart,
    report,
    scan,
    serve,
    share,
)
from loracurve.inference.config import GenerateConfig
from loracurve.landscape.config import ScanConfig
from loracurve.runs.config import RunConfig, load_config, run_parser
from loracurve.serving.config import ServeConfig
from loracurve.system import distributed
from loracurve.system.errors import UserError, nearest, one_line
from loracurve.system.options import Parser, parse

__all__ = ["COMMANDS", "main", "parse_fit_config", "spell_out"]


COMMANDS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (quickstart, fit, evaluate, predict, generate, serve, export, calibrate, scan, report, share, bench)
}

# Commands in which several processes of a launcher share the work.
SHARED = ("fit", "evaluate", "predict")

# Commands whose first argument is a dataclass of options.
OPTIONS: dict[str, type[Any]] = {"scan": ScanConfig, "generate": GenerateConfig, "serve": ServeConfig}


def parse_fit_config(path: str | Path) -> RunConfig:
    """Read a YAML file as `loracurve fit` does."""
    return load_config(path)


def _command_parser(name: str) -> Parser:
    command = COMMANDS[name]
    described = inspect.getdoc(command) or ""
    options: dict[str, Any] = {"prog": f"loracurve {name}", "description": described.split("\n\n")[0]}
    if name == "bench":
        from loracurve.bench.suite_files import suite_parser

        parser = suite_parser(**options)
        parser.add_function_arguments(command, as_positional=False, skip={"suite"})
        return parser
    if name != "fit":
        parser = Parser(**options)
        if name in OPTIONS:
            parser.add_class_arguments(OPTIONS[name])
        # Lists are options: a positional list would have to be given as JSON.
        parser.add_function_arguments(command, as_positional=name != "report", skip={"options"})
        return parser
    parser = run_parser(**options)
    help_by_name = {p.arg_name: p.description for p in docstring_parser.parse(described).params}
    parser.add_argument("--out", type=str, required=True, help=help_by_name["out"])
    parser.add_argument("--resume", action="store_true", help=help_by_name["resume"])
    return parser


def _usage() -> str:
    lines = ["usage: loracurve COMMAND [options]   (loracurve COMMAND --help lists them)", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:12}{(inspect.getdoc(command) or '').splitlines()[0]}")
    return "\n".join(lines)


def _run(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    name, rest = arguments[0], list(arguments[1:])
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}; commands are {', '.join(COMMANDS)}")
    if distributed.is_launched() and name not in SHARED:
        raise UserError(f"{name}: expected one process, found several; start it without torchrun or accelerate launch")
    if name == "fit" and rest and not rest[0].startswith("-"):
        rest.insert(0, "--config")
    if name == "bench" and not {"-h", "--help"} & set(rest):
        from loracurve.bench.suite_files import config_arguments

        if not rest or rest[0].startswith("-"):
            raise UserError("bench: expected a suite first, a YAML file or smoke, small or paper, found none")
        rest = config_arguments(rest[0], [w.replace("--tables-only", "--tables_only") for w in rest[1:]])
    if name == "scan" and rest and not rest[0].startswith("-"):
        rest.insert(0, "--run")
    if name == "report" and rest and not rest[0].startswith("-"):
        rest.insert(0, "--runs")
    parser = _command_parser(name)
    lists = {"scan": ("--adapters", "--paths"), "report": ("--runs",)}.get(name, ())
    flags = [f"--{p.name}" for p in inspect.signature(COMMANDS[name]).parameters.values() if p.annotation == "bool"]
    rest = spell_out(rest, lists, () if name == "fit" else flags)
    with redirect_stderr(StringIO()):  # the parser prints usage with its errors; one line says it
        values = parse(parser, rest)
    if name == "fit":
        config = RunConfig(**{f.name: values[f.name] for f in fields(RunConfig)})
        fit(config, values.out, values.resume)
    elif name in OPTIONS:
        options = OPTIONS[name](**{f.name: values[f.name] for f in fields(OPTIONS[name])})
        names = [p for p in inspect.signature(COMMANDS[name]).parameters if p != "options"]
        COMMANDS[name](options, **{p: values[p] for p in names})
    elif name == "bench":
        from loracurve.bench.suite import suite_of

        bench(suite_of(values), **{p: values[p] for p in inspect.signature(bench).parameters if p != "suite"})
    else:
        COMMANDS[name](**{p: values[p] for p in inspect.signature(COMMANDS[name]).parameters})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    _quieten_upstream()
    try:
        distributed.join()
        with nullcontext() if distributed.is_main() else _silence():
            _run(sys.argv[1:] if arguments is None else arguments)
        distributed.leave()
    except UserError as error:
        if distributed.speaks_first():
            print(f"loracurve: {one_line(error)}", file=sys.stderr, flush=True)
            distributed.told()
        return 2
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        if distributed.is_main():
            print(
                "loracurve: interrupted; the same command goes on (fit and quickstart: with --resume)", file=sys.stderr
            )
        return 130
    except Exception:
        if distributed.speaks_first():
            raise
        return 1  # another process has told its fault, of which this may be no more than a consequence
    return 0


@contextmanager
def _silence() -> Iterator[None]:
    """What this process would print is what the main one prints."""
    logging.disable(logging.WARNING)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _quieten_upstream() -> None:
    """Keep progress bars and notices of loading libraries out of the output; errors still show."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    sys.exit(main())


def spell_out(arguments: Sequence[str], lists: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Options as the parser takes them: `--adapters A B` as `--adapters=["A", "B"]`, `--best` as `--best=true`.

    A value given to a flag (`--best false`) stays.
    """
    out: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in lists:
            values = []
            while rest and not rest[0].startswith("-"):
                values.append(rest.pop(0))
            listed = len(values) == 1 and values[0].startswith("[")
            word = f"{word}={values[0] if listed else json.dumps(values)}"
        elif word in flags and not (rest and rest[0].lower() in ("true", "false")):
            word = f"{word}=true"
        out.append(word)
    return out
