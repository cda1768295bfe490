"""Python in the documents runs, and the notebook's page shows what the notebook does."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.documents import DOCUMENTS, fenced
from helpers.made import made_task, vocabulary, write_rows
from helpers.made_runs import Maker
from helpers.places import ROOT
from helpers.ranks import together
from helpers.tiny import lora_config, tiny
from helpers.tokenizers_made import llama_style
from helpers.trainers import arguments, rows

import loracurve as lc
from loracurve.bench.tiny_model import TINY, tiny_model
from loracurve.inference.predictive import Predictive
from loracurve.training.trainer import CurveTrainer


def python_in(document: str) -> list[str]:
    """Blocks of a document, those apart that only include a file."""
    return [b for b in fenced("python", (ROOT / document).read_text()) if not b.startswith("{% include")]


def test_the_suite_of_the_bench_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sst2", "ag_news"):
        write_rows(tmp_path / "my-data" / name, {"train": 12, "validation": 8, "test": 8}, start=f"{name} ")
    (block,) = python_in("docs/bench.md")
    short = 'data_folder="my-data", anchors=5, samples=3, training=lc.LoopConfig(steps=2, batch_size=4)'
    exec(block.replace('"my-model"', repr(TINY)).replace('data_folder="my-data"', short), {})
    table = (tmp_path / "runs" / "mine" / "tables.md").read_text()
    assert "| ensemble 5 |" in table and "| curve |" in table and "left_out" not in table


def test_the_text_of_the_generation_page_runs() -> None:
    base, tokenizer = tiny_model()
    model = lc.CurveModel(base, lora_config("qwen2"), lc.CurveSpec(1, 1))
    names: dict[str, Any] = {"model": model, "tokenizer": tokenizer}
    (block,) = python_in("docs/generate.md")
    exec(block, names)
    assert 0 < len(names["texts"][0].tokens) <= 30


def test_the_trainers_of_the_trainer_page_run(tmp_path: Path) -> None:
    first, second = python_in("docs/trainer.md")
    names: dict[str, Any] = {"lc": lc, "CurveTrainer": CurveTrainer, "config": lora_config("llama")}
    names |= {"base": tiny("llama"), "args": arguments(tmp_path, max_steps=1), "others": {"train_dataset": rows(4)}}
    exec(first, names)
    assert names["trainer"].train().global_step == 1
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from loracurve.training.sft import CurveSFTTrainer

    tokenizer = llama_style()
    texts = datasets.Dataset.from_list([{"text": "the film is good"}] * 4)
    names |= {"CurveSFTTrainer": CurveSFTTrainer, "SFTConfig": trl.SFTConfig, "others": {"train_dataset": texts}}
    names |= {"base": tiny("llama", vocabulary=len(tokenizer)), "tokenizer": tokenizer, "out": str(tmp_path)}
    exec(second.replace("(out, ", "(out, max_steps=1, report_to='none', use_cpu=True, save_strategy='no', "), names)
    assert names["trainer"].train().global_step == 1


@pytest.mark.parametrize(("block", "name"), [(0, "trainer"), (1, "sft")])
def test_the_trainer_scripts_differ_as_their_page_shows(block: int, name: str) -> None:
    shown = [*fenced("diff", (ROOT / "docs" / "trainer-examples.md").read_text())][block].splitlines()
    before, after = (
        (ROOT / "examples" / file).read_text().split('"""', 2)[2].splitlines()
        for file in (f"plain_{name}.py", f"{name}.py")
    )
    differences = [*difflib.unified_diff(before, after, lineterm="", n=1)][2:]
    assert shown == ["@@" if line.startswith("@@") else line for line in differences]


def test_the_python_of_the_export_page_runs(fitted: Maker) -> None:
    names: dict[str, Any] = {}
    block, piped = python_in("docs/how-to/export.md")
    exec(piped.replace('"runs/mine"', repr(str(fitted("free", "head")))), names)
    assert [answer["label"] in ("negative", "positive") for answer in names["found"]] == [True, True]
    assert all("within_points" in answer for answer in names["every"]) and len(names["every"]) == 2
    exec(block, names)
    draw = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(3, 4, 5, generator=draw), torch.tensor([0.5, 0.2, 0.3])
    expected = Predictive.from_log_probs(logits.log_softmax(-1), weights).probs
    torch.testing.assert_close(names["average"](logits, weights).double(), expected, atol=1e-6, rtol=1e-6)


def test_the_script_of_the_page_on_several_gpus_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = python_in("docs/how-to/gpus.md")
    task = made_task(tmp_path, "qwen2", "letter")

    def work(rank: int) -> float:
        names: dict[str, Any] = {"config": lora_config("qwen2"), "task": task, "t": torch.tensor([0.0, 0.5, 1.0])}
        names |= {"base": tiny("qwen2", vocabulary=vocabulary(task)), "labels": task.labels("test")}
        exec(block.replace("steps=600", "steps=2, batch_size=4"), names)
        return float(names["predictive"].negative_log_likelihood(names["labels"]).mean())

    first, second = together(work, tmp_path / "results")
    assert first == second > 0
    assert (tmp_path / "curve" / "control_points.safetensors").is_file()


RUN_BY = {
    "README.md": "runs/test_classifier.py::test_the_example_of_the_readme_runs",
    "docs/bench.md": "whole/test_documents_run.py::test_the_suite_of_the_bench_page_runs",
    "docs/generate.md": "whole/test_documents_run.py::test_the_text_of_the_generation_page_runs",
    "docs/how-to/export.md": "whole/test_documents_run.py::test_the_python_of_the_export_page_runs",
    "docs/how-to/gpus.md": "whole/test_documents_run.py::test_the_script_of_the_page_on_several_gpus_runs",
    "docs/how-to/own-data.md": "tasks/test_own_data.py::test_the_example_of_the_page_runs",
    "docs/how-to/polygraph.md": "runs/test_polygraph.py::test_the_example_of_the_page_runs",
    "docs/how-to/scikit-learn.md": "runs/test_classifier.py::test_the_examples_of_the_page_run",
    "docs/landscape.md": "runs/test_scan.py::test_the_notebook_example_runs",
    "docs/serve.md": "serving/test_openai.py::test_the_example_of_the_page_runs",
    "docs/serving.md": "serving/test_multi_lora_client.py::test_the_example_of_the_page_runs",
    "docs/quickstart.md": "whole/test_documents.py::test_the_python_of_the_quickstart_page_runs",
    "docs/sharing.md": "runs/test_share.py::test_the_example_of_the_page_runs",
    "docs/trainer.md": "whole/test_documents_run.py::test_the_trainers_of_the_trainer_page_run",
}


def test_every_document_with_python_is_run_by_a_test() -> None:
    assert {d for d in DOCUMENTS if python_in(d) and d != NOTEBOOK[1]} == set(RUN_BY)
    for test in RUN_BY.values():
        file, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{test} is not there"


# ---- the notebook

NOTEBOOK = ("examples/session.py", "docs/session.md", "examples/session.ipynb")


NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/notebook.py"""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("notebook")


def test_cells_are_read_run_and_written(notebook: ModuleType) -> None:
    text = "# %% [markdown]\n# # A title\n#\n# Text.\n\n# %%\nx = 2\n\n# %%\nprint(x + 1)\n"
    cells = notebook.cells_of(text)
    assert [(c.source, c.is_text) for c in cells] == [
        ("# A title\n\nText.", True),
        ("x = 2", False),
        ("print(x + 1)", False),
    ]
    assert notebook.run(cells)["x"] == 2
    shown = "# A title\n\nText.\n\n```python\nx = 2\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n"
    assert notebook.page(cells, "pictures/x") == shown
    made = json.loads(notebook.jupyter(cells, []))
    assert [cell["cell_type"] for cell in made["cells"]] == ["markdown", "code", "code"]
    assert made["cells"][2]["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["3\n"]}]


def test_the_notebook_runs_as_its_page_shows(
    notebook: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Word for word; numbers of trained models, which differ a little between machines, nearly."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells = notebook.cells_of((ROOT / NOTEBOOK[0]).read_text())
    names = notebook.run(cells)
    found, shown = notebook.page(cells, "pictures/session"), (ROOT / NOTEBOOK[1]).read_text()
    shown = shown[: shown.rindex("\nMade by `python docs/notebook.py")]
    assert NUMBER.sub("#", found) == NUMBER.sub("#", shown), "the page is old: run docs/notebook.py"
    pairs = [[float(x) for x in NUMBER.findall(text)] for text in (found, shown)]
    assert pairs[0] == pytest.approx(pairs[1], abs=0.1)
    jupyter = json.loads((ROOT / NOTEBOOK[2]).read_text())["cells"]
    assert ["".join(cell["source"]) for cell in jupyter] == [c.source for c in cells]
    outputs = [[o["output_type"] for o in cell.get("outputs", [])] for cell in jupyter]
    assert outputs == [["stream"] * bool(c.printed) + ["display_data"] * len(c.figures) for c in cells]
    for number in range(1, sum(len(c.figures) for c in cells) + 1):
        assert (ROOT / "docs" / "pictures" / f"session-{number}.svg").is_file()
    # What the text promises: an aligned path without a barrier, doubt where there is reason for it, few errors.
    height = names["barriers"].groupby("path")["excess"].max()
    assert height["balanced+procrustes"] < 0.1 * height["straight"]
    decided, undecided = names["tested"].index(~names["is_open"]), names["tested"].index(names["is_open"])
    assert undecided.expected_entropy.mean() > 2 * decided.expected_entropy.mean()
    assert names["unseen"].mutual_information.mean() > 4 * decided.mutual_information.mean()
    assert names["wrong"][names["answered"]].double().mean() <= 0.05
