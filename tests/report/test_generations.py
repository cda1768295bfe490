"""The command generate: JSON lines, colours in the terminal, the HTML file, and what it refuses."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.made_runs import QUICK, base_folder, command, config_file, data_folder, tree_hash

from loracurve.cli import main
from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import Generation
from loracurve.inference.generation import generate as decode
from loracurve.report.generations import print_generation, write_generations
from loracurve.runs.run import open_run

LIMIT = ["--max_new_tokens=4", "--points=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted run of language modelling."""
    root = tmp_path_factory.mktemp("generate")
    config = config_file(root / "lm.yaml", base_folder(root / "base", "llama"), data_folder(root / "data", "lm"), "lm")
    command("fit", config, "--out", root / "run", "--curve.kind=free", *QUICK)
    return root / "run"


class _Tokens(HTMLParser):
    """The text of each token on a page, its style and its figures; and every address the page names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tokens: list[dict[str, str]] = []
        self.addresses: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.addresses += [named[name] for name in ("src", "href") if name in named]
        self.inside = tag == "span" and named.get("class") == "token"
        if self.inside:
            self.tokens.append({"text": "", **named})

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tokens[-1]["text"] += data


def test_rows_become_lines_equal_to_the_function(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"id": "a", "prompt": "the film is"}, {"id": 7, "text": "quite good", "other": 1}]
    file.write_text("\n".join(map(json.dumps, rows)))
    before = tree_hash(run)
    capsys.readouterr()
    same = ["generate", run, "--input", file, *LIMIT, "--temperature=1", "--top_p=.9", "--seed=3"]
    command(*same)
    printed = capsys.readouterr().out
    assert tree_hash(run) == before
    lines = [json.loads(line) for line in printed.splitlines()]
    opened = open_run(run)
    config = GenerateConfig(max_new_tokens=4, temperature=1, top_p=0.9, seed=3)
    average = opened.average()
    t, weights = average.t[[0, -1]], average.weights[:2] * 1.5
    expected = decode(opened.model, opened.task.tokenizer, ["the film is", "quite good"], config, t, weights)
    assert [line["id"] for line in lines] == ["a", "7"]
    for line, generation in zip(lines, expected, strict=True):
        assert line["token_ids"] == generation.token_ids and line["text"] == generation.text
        for name in ("log_probs", "entropy", "expected_entropy", "mutual_information", "weights"):
            assert line[name] == pytest.approx(getattr(generation, name), abs=2e-6)
    command(*same, "--out", tmp_path / "o")
    assert (tmp_path / "o").read_text() == printed


def test_a_prompt_is_printed_and_written_as_one_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    prompt = 'null: {"<b>": 1} &amp;'  # neither YAML nor HTML
    command("generate", run, "--prompt", prompt, *LIMIT, "--weights=sequence", "--html", tmp_path / "p.html")
    said = capsys.readouterr().out
    assert said.startswith(prompt) and "colour: mutual information" in said and "nats" in said
    text = (tmp_path / "p.html").read_text()
    page = _Tokens(text)
    assert len(page.tokens) == 4 or "cut at" not in text
    assert "null: {&#34;&lt;b&gt;&#34;: 1} &amp;amp;" in text
    assert not page.addresses and "://" not in text and "<script" not in text, "the file is complete in itself"


def test_colours_follow_the_measure_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = Generation(
        "say", " a<b", [1, 2, 3], [" a", "<", "b"], [-1.0, -2.0, -0.5], [0.5, 1.0, 0.25], [0.5, 0.5, 0.25]
    )
    generation.mutual_information = [0.0, 0.5, 0.0]
    write_generations(tmp_path / "page.html", [generation])
    tokens = _Tokens((tmp_path / "page.html").read_text()).tokens
    assert [token["text"] for token in tokens] == [" a", "<", "b"]
    assert tokens[1]["style"] == "--mutual_information:1.000;--expected_entropy:1.000;--entropy:1.000;"
    assert tokens[2]["style"] == "--mutual_information:0.000;--expected_entropy:0.500;--entropy:0.250;"
    assert "mutual information 0.5000 nats" in tokens[1]["title"] and "log p -2.000" in tokens[1]["title"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    print_generation(generation)
    said = capsys.readouterr().out
    assert "[30;48;2;235;85;60m<" in said and "48;2;255;255;255mb" in said
    assert "mutual information 0.167" in said and "up to 0.500 nats" in said


def test_what_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken, rows = tmp_path / "taken.html", tmp_path / "rows.jsonl"
    taken.write_text("mine")
    rows.write_text('{"id": "a", "promt": "x"}\n')
    base, data = base_folder(tmp_path / "base", "encoder"), data_folder(tmp_path / "head-data", "head")
    command("fit", config_file(tmp_path / "head.yaml", base, data, "head"), "--out", tmp_path / "head", *QUICK)
    for arguments, message in (
        ([run], "expected --prompt TEXT or --input FILE.jsonl, found both or neither"),
        ([run, "--prompt=a", f"--input={rows}"], "found both or neither"),
        ([run, "--prompt=a", f"--html={taken}"], "taken.html exists already"),
        ([run, f"--input={rows}"], "rows.jsonl, line 1: expected a field 'prompt'"),
        ([run, "--prompt=a", "--max_new_tokens=511"], "expected at most 512 tokens with 511 new ones, found "),
        ([run, "--prompt=a", "--max_new_tokens=0"], "max_new_tokens: expected a whole number >= 1, found 0"),
        ([run, "--prompt=a", "--weights=some"], "weights: expected one of 'fixed', 'sequence'"),
        ([run, "--prompt=a", "--temprature=1"], "unknown option temprature; did you mean 'temperature'"),
        ([run, "--prompt=a", "--points=0"], "points: expected a whole number in [1, 100000], found 0"),
        ([tmp_path / "head", "--prompt=a"], "found a classifier; use loracurve predict"),
        ([tmp_path, "--prompt=a"], "expected a run directory with a fitted curve"),
    ):
        capsys.readouterr()
        assert main(["generate", *map(str, arguments)]) == 2, message
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert taken.read_text() == "mine"
