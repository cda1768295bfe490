"""Names, notes and prompts that are code elsewhere: in cards, pages, tables, figures and the terminal they are text."""

from __future__ import annotations

import ast
import copy
import csv
import json
import random
import re
import shutil
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.made import write_rows
from helpers.made_runs import QUICK, base_folder, command
from helpers.suites import little
from markdown_it import MarkdownIt
from markdown_it.token import Token

from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.single import Single
from loracurve.bench.config import SuiteTask
from loracurve.bench.runner import run_suite
from loracurve.bench.tables.write import write_tables
from loracurve.cli import main
from loracurve.inference.generation import Generation
from loracurve.report.generations import print_generation, write_generations
from loracurve.report.terminal import print_report
from loracurve.system.escaping import inline

SPLITS = ("train", "validation", "test")
SCRIPT = "<script>alert(1)</script>"
# As a folder has it, without a slash.
NAME = "=x|y[red]$\\frac{a}$<img src=x onerror=alert(1)>[/]\x1b[2J\u202e".replace("/", ":")
LABELS = [f"{SCRIPT}\x1b]0;x\x07", "[click](javascript:alert(1)) | *b*"]
NOTES = "---\n# Heading\n\n```python\nimport os\n```\n<iframe src=javascript:alert(1)></iframe>\n\n| a |\n|---|\n"
ANSWERS = ["negative", "positive"]
PROMPT = "```\n</pre>\n~~~\n````md\n# {text}\nIs it [a](b)?"


def data_of(folder: Path, prefix: str = "") -> Path:
    write_rows(folder, {"train": 40, "validation": 24, "test": 17})
    meta = {"task": "classification", "labels": LABELS, "notes": NOTES, "source": NOTES}
    (folder / "meta.json").write_text(json.dumps(meta))
    for split in SPLITS:
        rows = (folder / f"{split}.jsonl").read_text()
        (folder / f"{split}.jsonl").write_text(rows.replace('"text": "', f'"text": "{prefix}'))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted run whose folder, data set, classes, notes, prompt and other set are hostile."""
    root = tmp_path_factory.mktemp("texts")
    config = {
        "model": {"name": str(base_folder(root / "base", "qwen2"))},
        "task": {"data": str(data_of(root / NAME)), "scoring": "label", "prompt": PROMPT, "answers": ANSWERS},
        "curve": {"kind": "anchored"},
        "evaluation": {"ood": [str(data_of(root / f"_{NAME}", "so "))]},
    }
    (root / "config.yaml").write_text(json.dumps(config))
    out = root / "runs" / NAME
    command("fit", root / "config.yaml", "--out", out, *QUICK)
    return out


class Page(HTMLParser):
    """The tags of a page, its attributes and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        assert all("javascript:" not in (v or "") for k, v in attrs if k in ("src", "href"))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def harmless_page(path: Path) -> str:
    """The words of a page that holds nothing but its own tags."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.isdisjoint({"script", "iframe", "pre"}) and not any(n.startswith("on") for n in page.names)
    assert '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';' in text
    assert harmless_terminal(text)
    return " ".join(page.words)


def harmless_terminal(text: str) -> bool:
    return not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def blocks(text: str) -> list[Token]:
    """The tokens of Markdown without HTML, images and links elsewhere than to the hub and arXiv."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    inner = [t for token in tokens for t in token.children or ()]
    assert {"html_block", "html_inline", "image"}.isdisjoint(t.type for t in (*tokens, *inner))
    links = {t.attrs["href"] for t in inner if t.type == "link_open"}
    assert all(re.match(r"https://(huggingface\.co|arxiv\.org)/", str(link)) for link in links)
    return tokens


def sound_card(text: str) -> str:
    """The card's Markdown behind its header; everything in it is what the template says."""
    header, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    assert yaml.safe_load(header)["base_model"] == "org/tiny"
    tokens = blocks(body)
    heads = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert heads[1:] == ["How to load", "Data", "Training", "Results", "Limitations", "Method"]
    code, *shown = [t for t in tokens if t.type in ("fence", "code_block")]
    assert code.info == "python" and all(t.info == "text" for t in shown) and len(shown) <= 1
    calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(code.content)) if isinstance(n, ast.Call)}
    assert calls <= {"lc.CurveModel.from_pretrained", "lc.load_base", "print", "lc.generate", "model.export"}
    for table in re.findall(r"(?:^\|.*\|\n)+", body, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert harmless_terminal(text)
    return body


def test_a_card_of_hostile_texts(run: Path, tmp_path: Path) -> None:
    command("share", run, "--out", tmp_path / "out", "--base", "org/tiny")
    tokens = blocks(sound_card((tmp_path / "out" / "README.md").read_text()))
    said = [
        " ".join("".join(c.content or "\n" for c in t.children or ()).split()) for t in tokens if t.type == "inline"
    ]
    assert said[0] == inline(NAME)
    words = " ".join(said)
    for text in (*LABELS, NOTES):
        assert inline(text) in words
    prompt = [t.content for t in tokens if t.type == "fence"][1]
    assert prompt == f"{PROMPT} {'| '.join(ANSWERS)}\n"


def test_pages_and_figures_of_hostile_texts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    command("report", run, "--out", tmp_path / "page.html")
    said = harmless_page(tmp_path / "page.html")
    assert inline(NAME) in said and f"ood:_{inline(NAME)}" in said
    piece = f"{SCRIPT}\x1b[2J\u202e"
    generation = Generation(
        NAME, tokens=[piece], log_probs=[-1.0], entropy=[0.5], expected_entropy=[0.4], mutual_information=[0.1]
    )
    write_generations(tmp_path / "texts.html", [generation], NAME)
    assert SCRIPT in harmless_page(tmp_path / "texts.html")
    capsys.readouterr()
    print_generation(generation)
    shown = capsys.readouterr().out
    assert harmless_terminal(shown) and "\\x1b[2J" in shown


def test_the_terminal_shows_hostile_names(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["methods"][NAME] = metrics["methods"].pop("ensemble")
    capsys.readouterr()
    print_report(metrics)
    shown = capsys.readouterr().out
    # A method in two tables, the other set in one of parts and in the line of each of five methods.
    assert harmless_terminal(shown) and shown.count(inline(NAME)) == 8


METHODS = {f"{NAME}{SCRIPT}": Single(), "_@SUM(1)|*a*, ": Ensemble(2), "-1+1 &amp; `x`": Single(keep="last")}


def test_tables_and_the_page_of_a_hostile_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(tmp_path / "sets" / "made")
    other = data_of(tmp_path / "sets" / "other", "so ")
    task = SuiteTask(data=str(data), scoring="label", answers=ANSWERS, prompt=PROMPT, ood=[str(other)])
    suite = little(tmp_path / "sets", tasks={f"+{NAME}": task}, methods=METHODS)
    run_suite(suite, tmp_path / "out", jobs=1)
    assert harmless_terminal(capsys.readouterr().err)
    tables = write_tables(suite, tmp_path / "out", page=True)
    said = harmless_page(tmp_path / "out" / "report.html")
    assert all(inline(name) in said for name in METHODS)
    for table in tables:
        text = (tmp_path / "out" / "tables" / f"{table.name}.md").read_text()
        tokens = blocks(text)
        kinds = [t.type for t in tokens]
        assert kinds.count("table_open") == kinds.count("heading_open") == 1 and harmless_terminal(text)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(table.columns) + 1}
        with (tmp_path / "out" / "tables" / f"{table.name}.csv").open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not any(re.match(r"\s*[=@]|\s*[+-](?![\d.]+(e[+-]?\d+)?$)", cell) for cell in cells)
        latex = (tmp_path / "out" / "tables" / f"{table.name}.tex").read_text()
        body = latex.partition("\\toprule\n")[2].partition("\\bottomrule")[0].replace("\\midrule\n", "")
        for row in body.splitlines():
            assert len(re.findall(r"(?<!\\)&", row)) == len(table.columns) - 1 and row.endswith(r" \\")
            assert set(re.findall(r"\\([A-Za-z]+)", row)) <= {"textbackslash", "textasciitilde", "textasciicircum"}
    (summary,) = [t for t in tables if t.name == "summary"]
    assert {row[1] for row in summary.rows} >= set(METHODS)


VALUES: list[Any] = [
    *(None, True, -1, 0, 10**400, 1e308, -0.5, "", "x", SCRIPT, '0); __import__("os").system("id") #', "\ud800"),
    *([], ["x"], [[]], {}, {"a": 1}, "x" * 100_000),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in inner for p in places(v, (*path, k)))]


def changed(value: Mapping[str, Any], path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place, or without it."""
    out = holder = copy.deepcopy(value)
    for key in path[:-1]:
        holder = holder[key]
    if new is KeyError:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return out


def test_sharing_a_spoiled_run_writes_a_sound_card_or_says_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    metrics, config = json.loads((run / "metrics.json").read_text()), yaml.safe_load((run / "config.yaml").read_text())
    draw = random.Random(3)
    seed = ("curve_training", "seed")
    tries = [("config.yaml", json.dumps(changed(config, seed, v)), False) for v in (VALUES[10], [], None, 1.5)]
    tries += [("metrics.json", text, False) for text in ("[]", "{}", "3", '{"methods": NaN}', "[" * 10_000)]
    tries += [("environment.json", text, True) for text in ('{"device": "<b>|"}', '{"packages": {"=x": "](y"}}', "{}")]
    tries += [("environment.json", text, False) for text in ('{"device": 3}', '{"packages": []}', "[]")]
    known = [p for p in places(metrics) if p]
    wrong = {("task", "name"): [3], ("task", "classes"): "ab", ("task", "sizes"): {"train": "x"}, ("methods",): []}
    wrong |= {("methods", "curve", "passes"): "1", ("methods", "curve", "sets", "test", "nll"): "x", ("average",): 1}
    wrong |= {("methods", "curve", "sets", "test", "examples"): 1.5, ("comparisons",): [3], ("seconds",): {"total": []}}
    tries += [("metrics.json", json.dumps(changed(metrics, p, v)), False) for p, v in wrong.items()]
    fuzzed = [changed(metrics, draw.choice(known), draw.choice([KeyError, *VALUES])) for _ in range(30)]
    tries += [("metrics.json", json.dumps(values), None) for values in fuzzed]
    fine = 0
    for i, (name, text, expected) in enumerate(tries):
        original = (folder / name).read_text()
        (folder / name).write_text(text)
        capsys.readouterr()
        code, out = (
            main(["share", str(folder), "--out", str(tmp_path / str(i)), "--base", "org/tiny"]),
            tmp_path / str(i),
        )
        said = capsys.readouterr().err
        (folder / name).write_text(original)
        assert expected is None or (code == 0) == expected, (name, text[:200], said)
        if code == 0:
            sound_card((out / "README.md").read_text())
            fine += 1
        else:
            assert code == 2 and said.count("\n") == 1 and said.startswith("loracurve: ") and not out.exists(), said
    assert 10 < fine < len(tries) - 20
