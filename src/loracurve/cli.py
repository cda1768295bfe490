"""The command `loracurve`: options are made from the signatures and dataclasses of `commands`, the table of commands.

Nothing heavy is imported before the options are known to be right. Exit codes: 0 done, 2 the input is wrong (one line
on standard error), 130 interrupted, 1 a fault of ours.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from loracurve import commands
from loracurve.bench.config import SuiteConfig
from loracurve.bench.suite_files import config_arguments
from loracurve.inference.config import GenerateConfig
from loracurve.landscape.config import ScanConfig
from loracurve.runs.config import RunConfig, without_retired_words
from loracurve.serving.config import ServeConfig
from loracurve.system import distributed
from loracurve.system.consent import FLAG, VARIABLE, remote_code
from loracurve.system.errors import UserError, nearest, one_line
from loracurve.system.escaping import visible
from loracurve.system.options import Parser, parse
from loracurve.system.paths import check_given, is_path_error, reason
from loracurve.system.version import __version__

__all__ = ["COMMANDS", "Command", "main", "spell_out", "with_dashes"]


@dataclass(frozen=True)
class Command:
    """How a command's words become its arguments."""

    run: Callable[..., None]
    options: type[Any] | None = None
    """dataclass of options that its first parameter takes"""
    file: bool = False
    """whether these can come from a YAML file, `--config`"""
    leading: str | None = None
    """the option that a leading word without dashes is for; None: such words are positional"""
    lists: tuple[str, ...] = ()
    """options that take several words"""
    models: bool = True
    """whether it opens models, which may come with code"""
    shared: bool = False
    """whether several processes of a launcher share the work"""
    prepare: Callable[[list[str]], list[str]] = list
    """changes the words before they are parsed"""


def _suite_words(words: list[str]) -> list[str]:
    """The files that a suite's name stands for, in front of the other options."""
    if {"-h", "--help"} & set(words):
        return words
    if not words or words[0].startswith("-"):
        raise UserError("bench: expected a suite first, a YAML file or smoke, small or paper, found none")
    return config_arguments(words[0], words[1:])


# Arguments of commands that are paths, or names in their place.
_PATHS = ("run", "runs", "out", "input", "html", "task", "data", "adapters", "base")


COMMANDS: dict[str, Command] = {
    "quickstart": Command(commands.quickstart_command, models=False),
    "init": Command(commands.init_command, models=False),
    "fit": Command(
        commands.fit_command, RunConfig, file=True, leading="--config", shared=True, prepare=without_retired_words
    ),
    "evaluate": Command(commands.evaluate_command, shared=True),
    "predict": Command(commands.predict_command, shared=True),
    "generate": Command(commands.generate_command, GenerateConfig),
    "serve": Command(commands.serve_command, ServeConfig),
    "export": Command(commands.export_command),
    "distill": Command(commands.distill_command, shared=True),
    "calibrate": Command(commands.calibrate_command),
    "scan": Command(commands.scan_command, ScanConfig, leading="--run", lists=("--adapters", "--paths")),
    "report": Command(commands.report_command, leading="--runs", lists=("--runs",), models=False),
    "share": Command(commands.share_command, models=False),
    "bench": Command(commands.bench_command, SuiteConfig, file=True, prepare=_suite_words),
}


@cache
def _command_parser(name: str) -> Parser:
    command = COMMANDS[name]
    described = inspect.getdoc(command.run) or ""
    parser = Parser(prog=f"loracurve {name}", description=described.split("\n\n")[0])
    if command.file:
        parser.add_argument("--config", action="config", help="YAML file with the options below.")
    if command.options is not None:
        parser.add_class_arguments(command.options)
    first = next(iter(inspect.signature(command.run).parameters))
    if command.models:
        parser.add_argument(
            FLAG,
            action="store_true",
            help="Run code that comes with the model (the environment variable "
            f"{VARIABLE}=1 says the same). What a run, a suite or a config says of it is no consent.",
        )
    skip: set[str | int] | None = {first} if command.options else None
    # Lists are options: a positional list would have to be given as JSON.
    named = command.file or f"--{first}" in command.lists
    parser.add_function_arguments(command.run, as_positional=not named, skip=skip)
    return parser


def _usage() -> str:
    lines = ["usage: loracurve COMMAND [options]   (loracurve COMMAND --help lists them)", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:12}{(inspect.getdoc(command.run) or '').splitlines()[0]}")
    return "\n".join(lines)


def _run(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    name, words = arguments[0], list(arguments[1:])
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}; commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    parameters = [p for p in inspect.signature(command.run).parameters.values()]
    flags = [f"--{p.name}" for p in parameters if p.annotation == "bool"]
    words = with_dashes(_named_flags(words, flags), command.lists, flags)
    if distributed.is_launched() and not command.shared:
        raise UserError(f"{name}: expected one process, found several; start it without torchrun or accelerate launch")
    if command.leading and words and not words[0].startswith("-"):
        words.insert(0, command.leading)
    words = command.prepare(words)
    with redirect_stderr(StringIO()):  # the parser prints usage with its errors; one line says it
        values = parse(_command_parser(name), spell_out(words, command.lists, flags))
    given = {p.name: values[p.name] for p in parameters if p.name in values}
    for option in (option for option in _PATHS if given.get(option) is not None):
        for path in given[option] if isinstance(given[option], list) else [given[option]]:
            check_given(option, path)
    if command.options is not None:
        built = command.options(**{f.name: values[f.name] for f in fields(command.options)})
        given = {parameters[0].name: built} | {n: v for n, v in given.items() if n != parameters[0].name}
    _quieten_upstream()
    with remote_code(command.models and values[FLAG.lstrip("-").replace("-", "_")]):
        command.run(**given)


class _Visible(logging.Formatter):
    """Names and paths in messages do nothing to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    log = logging.StreamHandler()
    log.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(handlers=[log], level=logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    with _interruptions(until_the_end=arguments is None):
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> int:
    try:
        distributed.join()
        with nullcontext() if distributed.is_main() else _silence():
            _run(arguments)
        distributed.leave()
    except UserError as error:
        return _tell(str(error))
    except OSError as error:
        if is_path_error(error):
            return _tell(f"cannot use {error.filename or 'the disk'}: {reason(error)}; mend it or choose another path")
        return _break()
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        if distributed.is_main():
            print(
                "loracurve: interrupted; the same command goes on (fit and quickstart: with --resume)", file=sys.stderr
            )
        return 130
    except Exception:
        return _break()
    return 0


def _tell(text: str) -> int:
    """Say what is wrong with the input, in one line, once for all processes."""
    if distributed.speaks_first():
        print(f"loracurve: {one_line(text)}", file=sys.stderr, flush=True)
        distributed.told()
    return 2


def _break() -> int:
    """Raise the error that is being handled, a fault of ours."""
    if distributed.speaks_first():
        raise
    return 1  # another process has told its fault, of which this may be no more than a consequence


@contextmanager
def _interruptions(until_the_end: bool) -> Iterator[None]:
    """The first Ctrl-C is a KeyboardInterrupt, for which everything is left in order. One more ends the process where
    it stands: files are old or whole, locks end with it, and what is unfinished is removed by the next start.

    Args:
        until_the_end: whether the process ends with the command.
    """
    by_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not by_default or threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, _end)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        if not until_the_end:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: object) -> None:
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # the cursor, which progress bars hide
    os._exit(130)


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


def _named_flags(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Flags written with dashes, `--dry-run`, by the names that they have, `--dry_run`."""
    names = {flag.replace("_", "-"): flag for flag in flags}
    parts = [word.partition("=") for word in words]
    return [names.get(name, name) + equals + value for name, equals, value in parts]


def with_dashes(words: Sequence[str], lists: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Values and paths that begin with a dash as the parser takes them: `--out -x` as `--out=-x`, and a path that is
    there, `-run`, as `./-run`. Options of ours have two dashes, `-h` aside."""
    out: list[str] = []
    option = ""  # that takes the next word
    for word in words:
        dashed = len(word) > 1 and word[0] == "-" != word[1] and word != "-h"
        if dashed and option and option not in lists:
            out[-1] = f"{option}={word}"
        else:
            out.append(f"./{word}" if dashed and os.path.lexists(word) else word)
        if word.startswith("--"):
            option = "" if "=" in word or word in ("--", *flags) else word
        elif option not in lists:
            option = ""
    return out


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


if __name__ == "__main__":
    sys.exit(main())
