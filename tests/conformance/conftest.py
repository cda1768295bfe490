"""The matrix's own settings, and its table of results for the documentation."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import transformers
from helpers.places import ROOT

from conformance.cases import FLOAT32, WRITES
from conformance.families import FAMILIES

transformers.logging.disable_progress_bar()

_HEAD = """# Supported architectures

Every line is an architecture of transformers (version {version}) with tiny random weights, run by the library in a
covering design of cases: every pair of values of these axes occurs.

- way: rows (each row at a point of its own, as in training), tokens (packed rows, each example at a point of its own),
  points (all points together), merged (folded into the weights), generate (greedy decoding);
- scoring: letter, label, text, lm, head;
- prompts: shorter and longer than every attention window, and longer than the positions;
- padding side of the tokenizer; adapters: plain, rank and alpha patterns, rsLoRA, saved modules, grown vocabulary;
- precision: float32, bfloat16, 4-bit base.

*Equal*: log-probabilities are those of plain transformers with PEFT, one row at a time, within {limit:g} of their size
in float32 (the number is the largest difference found), or, where rounding alone is behind more, in float64. *Refused*:
an error of one line, shown here; where only some cases are refused, these are named in front. *Not yet*: what is known
to be wrong. Prompts that leave no room for new tokens are refused for all, and so is folding into a 4-bit base. `make
conformance` runs all cases and writes this page.
"""


FOLDED = "merged nf4"

_GPU = ROOT / "benchmarks" / "results" / "conformance_gpu.json"

_GPU_WAYS = ("captured", "rows", "tokens", "merged", "trained, captured and not")


def _gpu_lines() -> Iterator[str]:
    """What `conformance.on_gpu` found."""
    record = json.loads(_GPU.read_text())
    yield "## On a GPU\n"
    yield (
        f"{record['device']}, torch {record['versions']['torch']}, commit {record['commit']}, {record['date']}: the "
        "ways of a GPU against the CPU in float32, largest difference over scorings, short and long prompts. Captured "
        "in CUDA graphs (XLNet and DeBERTa cannot be and run without), packed and not, folded; and control "
        f"points after {record['steps']} steps of training with and without graphs. `{record['command']}`\n"
    )
    yield f"| architecture | {' | '.join(_GPU_WAYS)} |"
    yield f"|---|{'---|' * len(_GPU_WAYS)}"
    for name, found in record["differences"].items():
        worst = [max((v for k, v in found.items() if k.startswith(way)), default=None) for way in _GPU_WAYS]
        yield f"| {name} | {' | '.join('' if v is None else f'{v:.1g}' for v in worst)} |"
    yield ""


class _Table:
    """Outcomes by family, and the page made of them."""

    def __init__(self) -> None:
        self.cases: dict[str, int] = defaultdict(int)
        self.worst: dict[str, float] = defaultdict(float)
        self.refused: dict[str, dict[str, str]] = defaultdict(dict)
        self.wrong: dict[str, set[str]] = defaultdict(set)

    def add(self, report: pytest.TestReport) -> None:
        properties: dict[str, Any] = dict(report.user_properties)
        name = properties.get("family")
        if name is None:
            return
        self.cases[name] += 1
        if report.failed or hasattr(report, "wasxfail"):
            self.wrong[name].add(str(getattr(report, "wasxfail", "fails")))
        elif "refused" in properties and properties["refused"][0] == FOLDED:
            self.cases[name] -= 1  # what all refuse
        elif "refused" in properties:
            self.refused[name].setdefault(*properties["refused"])
        elif "exact" not in properties:
            self.cases[name] -= 1  # texts that are too long, which all refuse
        elif properties["exact"]:
            self.worst[name] = max(self.worst[name], properties["difference"])
        else:
            self.worst[name] += 0.0

    def page(self) -> str:
        lines = [_HEAD.format(version=transformers.__version__, limit=FLOAT32)]
        for kind, title in (("causal", "Causal language models"), ("classifier", "Sequence classifiers")):
            lines += [f"## {title}\n", "| architecture | result | largest difference | cases |", "|---|---|---|---|"]
            lines += [self._line(name) for name, family in FAMILIES.items() if family.kind == kind]
            lines.append("")
        return "\n".join([*lines, *_gpu_lines()])

    def _line(self, name: str) -> str:
        equal = name in self.worst
        parts = ["equal"] if equal else []
        parts += [f"refused{f' ({why})' if why else ''}: {text}" for why, text in sorted(self.refused[name].items())]
        parts += [f"not yet: {text}" for text in sorted(self.wrong[name])]
        cell = "; ".join(parts).replace("|", r"\|") or "not run"
        worst = f"{self.worst[name]:.1g}" if self.worst.get(name) else ""
        return f"| {FAMILIES[name].name} | {cell} | {worst} | {self.cases[name]} |"


_table = _Table()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect what the tests noted; with several workers this runs in the one that gathers."""
    if WRITES and report.when == "call":
        _table.add(report)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Write the page after a whole run."""
    yield
    if WRITES and _table.worst and not hasattr(session.config, "workerinput"):
        (ROOT / "docs" / "supported.md").write_text(_table.page())
