"""Every command with every path that is none: one line, exit code 2, before any work. Paths that only look odd work."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.made_runs import QUICK, Maker, command, tree_hash
from transformers import AutoModelForCausalLM

from loracurve.cli import COMMANDS, main, with_dashes
from loracurve.system.files import atomic_write
from loracurve.system.folders import locked
from loracurve.system.tables import read_table

WORDS = {
    "quickstart": ["quickstart", "--out", "OUT"],
    "init": ["init", "DATA", "--out", "FILE"],
    "fit": ["fit", "CONFIG", "--out", "OUT"],
    "fit on data": ["fit", "config.yaml", "--out", "new", "--task.data", "DATA"],
    "fit on a model": ["fit", "config.yaml", "--out", "new", "--model.name", "DATA"],
    "fit through adapters": ["fit", "config.yaml", "--out", "new", '--adapters=["run/anchors/0","DATA"]'],
    "evaluate": ["evaluate", "RUN", "--out", "OUT"],
    "evaluate on data": ["evaluate", "run", "--out", "new", "--task", "DATA"],
    "predict": ["predict", "RUN", "INPUT", "--out", "FILE"],
    "generate": ["generate", "RUN", "--input", "INPUT", "--out", "FILE"],
    "generate a page": ["generate", "run", "--prompt", "it is", "--html", "FILE"],
    "serve": ["serve", "RUN", "--port", "0"],
    "serve with a token": ["serve", "run", "--port", "0", "--token_file", "INPUT"],
    "export": ["export", "RUN", "--out", "OUT"],
    "distill": ["distill", "RUN", "--input", "INPUT", "--out", "OUT"],
    "calibrate": ["calibrate", "RUN", "--input", "INPUT"],
    "scan": ["scan", "RUN", "--out", "OUT"],
    "scan adapters": ["scan", "--adapters", "DATA", "run/anchors/0", "--task", "data", "--out", "OUT"],
    "scan of data": ["scan", "--adapters", "run/anchors/0", "run/anchors/1", "--task", "DATA", "--out", "new"],
    "report": ["report", "RUN", "--out", "FILE"],
    "report of two": ["report", "run", "RUN"],
    "share": ["share", "RUN", "--base", "owner/name", "--out", "OUT"],
    "bench": ["bench", "SUITE", "--out", "OUT"],
    "bench of a profile": ["bench", "smoke", "--profile", "SUITE", "--out", "new"],
}
"""Words of commands. Those in capitals are replaced by paths, one at a time; the others stand for what is there."""

GOOD = {
    "RUN": "run",
    "CONFIG": "config.yaml",
    "DATA": "data",
    "INPUT": "data/test.jsonl",
    "SUITE": "smoke",
    "OUT": "new",
    "FILE": "new",
}

LONG = "n" * 300

BAD = {
    "a long name": LONG,
    "a long name within": f"run/{LONG}",
    "a NUL byte": "a\0b",
    "nothing": "",
    "a home": "~",
    "within what may not be entered": "closed/inner/place",
    "a link to itself": "loop",
    "below a file": "notes.txt/place",
}

BAD_INPUT = BAD | {
    "a missing name with a colon": "a:b",
    "a missing name with a dash": "-x",
    "a link to nothing": "dangling",
    "what may not be read": "closed/inner",
}

BAD_OUTPUT = BAD | {"what may not be written": "closed/new"}

BAD_FOR = {
    "RUN": BAD_INPUT | {"a file": "notes.txt", "another folder": "run/anchors"},
    "CONFIG": BAD_INPUT | {"a folder": "run", "a closed file": "secret"},
    "DATA": BAD_INPUT | {"a file": "notes.txt", "another folder": "run/anchors"},
    "INPUT": BAD_INPUT | {"a folder": "run", "a closed file": "secret"},
    "SUITE": BAD_INPUT | {"a folder": "run", "a closed file": "secret"},
    "OUT": BAD_OUTPUT | {"a file": "notes.txt", "a folder with contents": "run", "a link to nothing": "dangling"},
    "FILE": BAD_OUTPUT | {"a folder": "run", "a file": "notes.txt"},
}


@pytest.fixture(scope="module")
def place(fitted: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, data, and places that are none. Others may enter it, as they may in /tmp."""
    for name in (
        "serving.app",
        "serving.http_protocol",
        "bench.runner",
        "bench.tables.write",
        "report.page",
        "curve.hub",
    ):
        importlib.import_module(f"loracurve.{name}")  # by root, whose libraries nobody else may be able to read
    "".encode("idna")  # as sockets do
    folder = tmp_path_factory.mktemp("paths")
    shutil.copytree(fitted("anchored", "letter"), folder / "run")
    shutil.copytree(fitted.data("letter"), folder / "data")
    shutil.copy(fitted.config("letter"), folder / "config.yaml")
    (folder / "notes.txt").write_text("mine")
    (folder / "secret").write_text("mine")
    (folder / "secret").chmod(0)
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "closed" / "inner").mkdir(parents=True)
    (folder / "closed" / "inner" / "place").write_text("mine")
    (folder / "closed").chmod(0)
    return folder


@contextlib.contextmanager
def not_root(folder: Path) -> Iterator[None]:
    """Permissions are nothing to root: as nobody inside the block, who may enter `folder`."""
    if os.geteuid():
        yield
        return
    closed = [p for p in (folder, *folder.parents) if not p.stat().st_mode & stat.S_IXOTH]
    for parent in closed:
        parent.chmod(parent.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def replaced(words: list[str], slot: str, path: str) -> list[str]:
    values = GOOD | {slot: path}
    return [values.get(word, word.replace("DATA", json.dumps(values["DATA"])[1:-1])) for word in words]


CASES = [
    pytest.param(name, slot, path, id=f"{name}, {slot}: {kind}")
    for name, words in WORDS.items()
    for slot in GOOD
    if any(slot in word for word in words)
    for kind, path in BAD_FOR[slot].items()
]


def test_every_command_is_in_the_table() -> None:
    assert {words[0] for words in WORDS.values()} == {*COMMANDS}


@pytest.mark.parametrize(("name", "slot", "path"), CASES)
def test_paths_that_are_none_cost_one_line(
    name: str,
    slot: str,
    path: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    before = sorted(os.listdir(place)), sorted(os.listdir(place / "run"))
    if slot in ("OUT", "FILE"):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("opened a model"))
    with not_root(place):
        code = main(replaced(WORDS[name], slot, path))
    said = capfd.readouterr()
    assert code == 2 and said.out == ""
    assert said.err.startswith("loracurve: ") and said.err.count("\n") == 1 and len(said.err) < 700, said.err
    assert (sorted(os.listdir(place)), sorted(os.listdir(place / "run"))) == before


GONE = 2**22 + 1
"""number of no process: above the largest"""


@pytest.fixture
def odd(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a run called -run."""
    shutil.copytree(place / "run", tmp_path / "-run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["a:b", "s3://a", "file:x", "n" * 255, "-x", "ä ö", "%41"])
def test_names_that_only_look_odd_are_names(name: str, odd: Path, place: Path) -> None:
    rows = place / "data" / "test.jsonl"
    command("evaluate", "-run", "--out", name, "--points=2")
    assert json.loads((odd / name / "metrics.json").read_text())["methods"]["curve"]["sets"]["test"]["examples"]
    command("predict", odd / name / ".." / "-run" if "/" not in name else "-run", rows, "--out", f"{name[:200]}.jsonl")
    assert len((odd / f"{name[:200]}.jsonl").read_text().splitlines()) == len(rows.read_text().splitlines())
    assert not [p for p in odd.rglob(".*")]


def test_a_run_in_a_folder_with_a_colon_is_fitted(odd: Path, place: Path) -> None:
    command("fit", place / "config.yaml", "--out", "a:b", *QUICK)
    command("share", "a:b", "--base", "owner/name", "--out", "c:d")
    whole = read_table(place / "run" / "predictions.parquet")
    assert read_table(Path("a:b", "predictions.parquet")).equals(whole)


def test_values_with_a_dash_are_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-run").mkdir()
    flags = ["--best"]
    assert with_dashes(["-run", "--out", "-x"], [], flags) == ["./-run", "--out=-x"]
    assert with_dashes(["--best", "-run", "-other", "-h"], [], flags) == ["--best", "./-run", "-other", "-h"]
    assert with_dashes(["--out=-x", "-run", "--t", "-1"], [], flags) == ["--out=-x", "./-run", "--t=-1"]
    assert with_dashes(["--runs", "-run", "a"], ["--runs"], flags) == ["--runs", "./-run", "a"]


def times(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in (folder, *sorted(folder.rglob("*")))]


def test_a_run_that_may_only_be_read_is_reported_on_elsewhere(odd: Path) -> None:
    run = odd / "-run"
    shutil.copytree(run, odd / "other")
    before = tree_hash(run), times(run)
    left = odd / f".-page.html.{GONE}.0123abcd.tmp"
    left.write_text("half")
    command("report", "-run", "other", "--out", "-page.html")
    assert (odd / "-page.html").is_file() and not left.exists()
    for name in ("-run", "other"):
        assert {"differences.png", "report.json"} <= {*os.listdir(odd / "-page-figures" / name)}
    assert (tree_hash(run), times(run)) == before


def test_all_files_of_a_run_have_the_permissions_of_new_ones(odd: Path) -> None:
    command("export", "-run", "--points=2", "--out", "out")
    (odd / "plain").touch()
    modes = {p.stat().st_mode for p in odd.rglob("*") if p.is_file()}
    assert modes == {(odd / "plain").stat().st_mode}


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "-run", "--out", "out"],
        ["export", "-run", "--out", "out"],
        ["scan", "-run", "--out", "out"],
        ["share", "-run", "--base", "owner/name", "--out", "out"],
        ["report", "-run"],
        ["calibrate", "-run"],
    ],
    ids=lambda words: words[0],
)
def test_commands_keep_others_out_of_the_folder_that_they_write(
    words: list[str], odd: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    held = odd / ("out" if "out" in words else "-run")
    with locked(held):
        assert main(words) == 2
    assert f"in use by process {os.getpid()}" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "-run", "--out", "out", "--points=2"],
        ["export", "-run", "--out", "out", "--points=2"],
        ["share", "-run", "--base", "owner/name", "--out", "out"],
        ["predict", "-run", "rows.jsonl", "--out", "file"],
        ["generate", "-run", "--prompt", "it", "--max_new_tokens=1", "--html", "file"],
        ["report", "-run"],
    ],
    ids=lambda words: words[0],
)
def test_what_killed_processes_left_is_removed(words: list[str], odd: Path, place: Path) -> None:
    (odd / "out").mkdir()
    shutil.copy(place / "data" / "test.jsonl", odd / "rows.jsonl")
    folder = odd / ("out" if "out" in words else "-run/figures" if words == ["report", "-run"] else ".")
    folder.mkdir(exist_ok=True)
    left = folder / f".{'file' if folder == odd else 'metrics.json'}.{GONE}.0123abcd.tmp"
    left.write_text("half")
    command(*words)
    assert not left.exists()


def test_metrics_of_an_evaluation_are_written_last(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def recorded(path: Path, write: Callable[[Path], object]) -> None:
        names.append(path.name)
        atomic_write(path, write)

    for module in ("files", "tables"):
        monkeypatch.setattr(f"loracurve.system.{module}.atomic_write", recorded)
    command("evaluate", "-run", "--out", "out", "--points=2")
    assert names == ["environment.json", "predictions.parquet", "metrics.json"]
