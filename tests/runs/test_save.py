"""Curves that were made in Python, as runs that the commands take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from helpers.made_runs import SCAN, SCORINGS, Maker, command, tree_hash
from helpers.read_runs import figures, logits, read, some_ids, table
from helpers.tiny import lora_config, random_points, tiny
from safetensors.torch import load_file

import loracurve as lc
from loracurve.cli import main
from loracurve.model.base_model import load_base
from loracurve.runs import evaluate
from loracurve.runs.config import load_config
from loracurve.runs.evaluate import evaluate_saved
from loracurve.runs.scan import run_to_scan

THREE = lc.EvaluationConfig(points=3)


def made(fitted: Maker, scoring: str, **options: Any) -> tuple[lc.CurveModel, lc.Task]:
    """A curve of drawn points and its task, by the library's own functions."""
    architecture, head = SCORINGS[scoring], scoring == "head"
    base, tokenizer = lc.load_base(str(fitted.base(architecture)), head, num_labels=2 if head else None, **options)
    task = lc.load_task(lc.TaskConfig(str(fitted.data(scoring)), scoring), tokenizer)  # type: ignore[arg-type]
    model = lc.CurveModel(base, lora_config(architecture))
    model.set_curve(model.spec, random_points(model))
    return model, task


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the same numbers


@pytest.mark.parametrize("scoring", ["letter", "text", "head"])
def test_every_command_gives_the_numbers_that_python_gives(scoring: str, fitted: Maker, tmp_path: Path) -> None:
    model, task = made(fitted, scoring)
    expected = lc.predict_split(model, task.encode("test"), points=3)
    run, rows = tmp_path / "run", fitted.data(scoring) / "test.jsonl"
    lc.save_run(model, task, run, THREE)
    opened = lc.open_run(run)
    again = opened.average().predict(opened.model, opened.task.encode("test"))
    assert torch.equal(again.log_probs, expected.log_probs) and torch.equal(again.entropy, expected.entropy)

    command("evaluate", run, "--out", tmp_path / "evaluated")
    for e, row in enumerate(table(tmp_path / "evaluated").values()):
        count = len(row["probs"])
        assert row["point_probs"] == [p[:count] for p in expected.point_probs[:, e].tolist()]

    command("predict", run, rows, "--out", tmp_path / "predicted.jsonl")
    for e, record in enumerate(lines(tmp_path / "predicted.jsonl")):
        assert record["probs"] == [round(p, 6) for p in expected.probs[e].tolist()[: len(record["probs"])]]
        assert record["mutual_information"] == round(float(expected.mutual_information[e]), 6)

    command("scan", run, "--paths", "curve", *SCAN)
    assert read(run / "scan" / "scan.json")["subject"]["anchors_from"] == "joints of the curve"
    points = model.control_points()
    anchors = run_to_scan(run, "auto").anchors
    assert all(torch.equal(tensor, points[name][:: model.spec.degree]) for name, tensor in anchors.items())

    command("calibrate", run, "--risk=.9")
    assert read(run / "calibration.json")["rows"] == len(task.encode("validation")), "its own validation rows"
    assert (run / "unknowns.json").is_file(), "built from the training rows"
    command("predict", run, rows, "--out", tmp_path / "calibrated.jsonl")
    assert all({"abstain", "set"} <= record.keys() for record in lines(tmp_path / "calibrated.jsonl"))


@pytest.mark.parametrize(("kind", "scoring"), [("anchored", "letter"), ("free", "head")])
def test_a_run_from_python_is_the_run_that_fit_writes(
    kind: str, scoring: str, fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same curve, saved by `fit` and once more from Python: all that commands write and print is the same."""
    first = Path(shutil.copytree(fitted(kind, scoring), tmp_path / "first"))
    for name in ("unknowns.json", "unknowns.safetensors"):
        (first / name).unlink()
    fit = lc.open_run(first)
    lc.save_run(fit.model, fit.task, tmp_path / "second", fit.config.evaluation)
    one, other = (read(tmp_path / name / "identity.json") for name in ("first", "second"))
    assert {**one, "made_with": 0, "base": 0} == {**other, "made_with": 0, "base": 0}
    assert one["base"]["config"] == other["base"]["config"]
    shape = load_config(tmp_path / "second" / "config.yaml").curve
    assert (shape.kind, shape.spec(shape.anchors)) == (kind, fit.model.spec)
    said = {}
    for name in ("first", "second"):
        run, out = tmp_path / name, tmp_path / f"{name}-out"
        capsys.readouterr()
        command("calibrate", run, "--risk=.9")
        command("predict", run, fitted.data(scoring) / "test.jsonl")
        command("evaluate", run, "--out", out / "evaluated")
        command("export", run, "--out", out / "points")
        command("export", run, "--best", "--out", out / "best")
        said[name] = capsys.readouterr().out.replace(str(out), "OUT")
    assert said["first"] == said["second"]
    for file in ("calibration.json", "unknowns.json"):
        assert read(tmp_path / "first" / file) == read(tmp_path / "second" / file)
    for file in ("evaluated/metrics.json", "points/index.json", "points/unknowns.json", "best/index.json"):
        assert read(tmp_path / "first-out" / file) == read(tmp_path / "second-out" / file)


def test_texts_and_answers_over_http_are_the_average_s(fitted: Maker, tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    from loracurve.serving.app import make_app
    from loracurve.serving.config import ServeConfig

    model, task = made(fitted, "lm")
    options = lc.GenerateConfig(max_new_tokens=5)
    expected = lc.generate(
        model, task.tokenizer, ["the film is"], options, *lc.quadrature("uniform", 3, model.spec.segments)
    )
    lc.save_run(model, task, tmp_path / "run", THREE)
    (tmp_path / "row.jsonl").write_text(json.dumps({"id": "a", "prompt": "the film is"}))
    asked = ["--input", tmp_path / "row.jsonl", "--max_new_tokens=5", "--out", tmp_path / "texts.jsonl"]
    command("generate", tmp_path / "run", *asked)
    (line,) = lines(tmp_path / "texts.jsonl")
    assert line == json.loads(json.dumps({"id": "a", **expected[0].record()}))
    with TestClient(make_app(lc.open_run(tmp_path / "run"), ServeConfig()), base_url="http://127.0.0.1") as client:
        answer = client.post("/generate", json={"prompts": ["the film is"], "max_new_tokens": 5}).json()
    assert answer["generations"][0]["text"] == expected[0].text


# ---- report and share


@pytest.mark.parametrize("scoring", ["letter", "head", "lm"])
def test_a_page_and_a_card_evaluate_the_run_first(scoring: str, fitted: Maker, tmp_path: Path) -> None:
    model, task = made(fitted, scoring)
    lc.save_run(model, task, tmp_path / "run", THREE)
    command("report", tmp_path / "run")
    metrics, page = read(tmp_path / "run" / "metrics.json"), (tmp_path / "run" / "report.html").read_text()
    expected = lc.predict_split(model, task.encode("test"), points=3)
    nll = float(expected.negative_log_likelihood(None if scoring == "lm" else task.labels("test")).mean())
    assert metrics["methods"]["curve"]["sets"]["test"]["nll"] == pytest.approx(nll, rel=1e-6)
    named = ["base model"] * (scoring != "head") + ["best point"] * (scoring != "lm") + ["curve"]
    assert list(metrics["methods"]) == named
    assert ": free curve of 2 segments</p>" in page and "rank None" not in page

    lc.save_run(model, task, tmp_path / "other", THREE)
    command("share", tmp_path / "other", "--out", tmp_path / "shared", "--base", "org/tiny")
    assert figures(read(tmp_path / "other" / "metrics.json")) == figures(metrics)
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "- in Python, by settings that are not recorded" in card and "learning rate" not in card
    assert "| curve | 3 |" in card


@pytest.mark.parametrize("scoring", ["letter", "head"])
def test_it_is_judged_as_fit_judges(
    scoring: str, fitted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, run = fitted("free", scoring), tmp_path / "run"
    opened = lc.open_run(first)
    lc.save_run(opened.model, opened.task, run, opened.config.evaluation)
    for name in ("unknowns.json", "unknowns.safetensors"):
        shutil.copy(first / name, run / name)
    evaluate_saved(run)
    one, other = (read(folder / "metrics.json") for folder in (first, run))
    for metrics in (one, other):
        del metrics["task"]["truncated"]  # fit counts its training rows too
    assert {name: one[name] for name in other} == other
    assert table(run) == table(first)
    monkeypatch.setattr(evaluate, "open_run", None)
    command("report", run)  # once is enough


def test_a_fit_that_was_interrupted_is_not_taken_for_one(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(fitted("free", "letter"), tmp_path / "run"))
    (run / "metrics.json").unlink()
    before = tree_hash(run)
    assert "found no metrics.json; make one with loracurve fit" in refused(capsys, "report", run)
    assert tree_hash(run) == before


def test_a_base_that_moved_is_said_to_the_page(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(shutil.copytree(fitted.base("qwen2"), tmp_path / "base"))
    base, tokenizer = lc.load_base(str(place))
    task = lc.load_task(lc.TaskConfig(str(fitted.data("letter")), "letter"), tokenizer)
    lc.save_run(lc.CurveModel(base, lora_config("qwen2")), task, tmp_path / "run", THREE)
    moved = shutil.move(place, tmp_path / "moved")
    assert "where the base lies elsewhere now, give --base" in refused(capsys, "report", tmp_path / "run")
    command("report", tmp_path / "run", "--base", moved)
    assert (tmp_path / "run" / "report.html").is_file()


# ---- what is opened again is what was saved


def test_points_exported_from_python_are_those_of_the_command(fitted: Maker, tmp_path: Path) -> None:
    model, task = made(fitted, "letter")
    lc.save_run(model, task, tmp_path / "run", THREE)
    command("export", tmp_path / "run", "--out", tmp_path / "command")
    model.export_points(tmp_path / "python", *lc.quadrature("uniform", 3, model.spec.segments))
    assert read(tmp_path / "python" / "index.json") == read(tmp_path / "command" / "index.json")
    for point in ("point-00", "point-01", "point-02"):
        one, other = (tmp_path / name / point for name in ("python", "command"))
        assert read(one / "adapter_config.json") == read(other / "adapter_config.json")
        tensors = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_the_dtype_of_the_weights_and_what_the_curve_brought_are_kept(fitted: Maker, tmp_path: Path) -> None:
    """A base that was loaded in another dtype than its checkpoint's, and embeddings that adapters brought along."""
    model, task = made(fitted, "letter", dtype="bfloat16")
    weights = {"model.embed_tokens.weight": model.model.get_input_embeddings().weight + 1}  # type: ignore[operator]
    model.bring(weights, "here")
    expected = logits(model, some_ids(), 0.3)
    lc.save_run(model, task, tmp_path / "run")
    opened = lc.open_run(tmp_path / "run")
    assert opened.model.dtype == torch.bfloat16
    assert torch.equal(logits(opened.model, some_ids(), 0.3), expected)


def test_the_run_is_a_curve_folder_too(fitted: Maker, tmp_path: Path) -> None:
    model, task = made(fitted, "letter")
    lc.save_run(model, task, tmp_path / "run")
    again = lc.CurveModel.from_pretrained(tmp_path / "run")
    assert torch.equal(logits(again, some_ids(), 0.3), logits(model, some_ids(), 0.3))


def test_a_base_that_transformers_loaded_is_known_by_its_folder(fitted: Maker, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = shutil.copytree(fitted.base("qwen2"), tmp_path / "base")
    base, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    task = lc.load_task(lc.TaskConfig(str(fitted.data("letter")), "letter"), tokenizer)
    model = lc.CurveModel.from_config(base, lora_config("qwen2"))
    lc.save_run(model, task, tmp_path / "run")
    assert lc.open_run(tmp_path / "run").config.model == lc.ModelConfig(str(place), dtype="float32")


# ---- refused in one line


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "rows.jsonl"),
        ("evaluate",),
        ("calibrate",),
        ("export", "--out=points"),
        ("scan",),
        ("generate", "--prompt=a"),
        ("serve", "--port=0"),
    ],
)
def test_a_curve_without_its_task_is_refused_by_every_command(
    words: tuple[str, ...],
    fitted: Maker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fitted("anchored", "letter") / "curve", "curve")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    error = refused(capsys, words[0], "curve", *words[1:])
    assert "curve: expected a run directory, found a curve without its task; make one of both in Python with" in error
    assert "loracurve.save_run(model, task, FOLDER)" in error
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_rows_that_are_gone_are_named_with_the_option_that_gives_others(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, known = made(fitted, "letter")
    data = Path(shutil.copytree(fitted.data("letter"), tmp_path / "data"))
    task = lc.load_task(lc.TaskConfig(str(data), "letter"), known.tokenizer)
    lc.save_run(model, task, tmp_path / "run")
    rows = Path(shutil.move(data / "test.jsonl", tmp_path / "rows.jsonl"))
    shutil.rmtree(data)
    command("predict", tmp_path / "run", rows)
    assert "or give others (evaluate --task, calibrate --input)" in refused(capsys, "evaluate", tmp_path / "run")


def test_what_cannot_be_opened_again_is_not_saved(fitted: Maker, tmp_path: Path) -> None:
    model, task = made(fitted, "letter")
    run = tmp_path / "run"
    (encoder, heads), lm = made(fitted, "head"), made(fitted, "lm")[1]
    with pytest.raises(lc.UserError, match=r"task: expected one for a language model, found one for a classification"):
        lc.save_run(model, heads, run)
    with pytest.raises(lc.UserError, match=r"expected one for a classification head of 2 classes, found one for a lan"):
        lc.save_run(encoder, task, run)
    with pytest.raises(lc.UserError, match=r"expected the tokenizer of .*qwen2, found another: its vocabulary differs"):
        lc.save_run(model, lm, run)
    frame = pd.DataFrame({"text": [f"{i} good" for i in range(40)], "label": ["no", "yes"] * 20})
    in_memory = lc.load_task(lc.TaskConfig(frame, "letter"), task.tokenizer)  # type: ignore[arg-type]
    with pytest.raises(lc.UserError, match=r"task\.data: expected a path or a name for a run, which is opened again"):
        lc.save_run(model, in_memory, run)
    nameless = lc.CurveModel.from_config(tiny("qwen2", vocabulary=len(task.tokenizer)), lora_config("qwen2"))
    with pytest.raises(lc.UserError, match=r"found one without a name; save it and its tokenizer .* by base"):
        lc.save_run(nameless, task, run)
    packed = made(fitted, "letter")[0]
    del packed.model.loracurve_loaded_with
    packed.model.is_loaded_in_4bit = True  # type: ignore[assignment]
    with pytest.raises(lc.UserError, match=r"expected a quantised model from loracurve\.load_base\(name, quantise="):
        lc.save_run(packed, task, run)
    assert not run.exists()
    lc.save_run(model, task, run)
    with pytest.raises(lc.UserError, match="exists already"):
        lc.save_run(model, task, run)


def test_a_base_without_a_name_is_saved_and_named(fitted: Maker, tmp_path: Path) -> None:
    _, task = made(fitted, "letter")
    base = tiny("qwen2", vocabulary=len(task.tokenizer))
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    task.tokenizer.save_pretrained(tmp_path / "base")
    model = lc.CurveModel.from_config(base, lora_config("qwen2"))
    lc.save_run(model, task, tmp_path / "run", base=str(tmp_path / "base"))
    command("export", tmp_path / "run", "--t=0.5", "--out", tmp_path / "one")
    config = read(tmp_path / "one" / "point-00" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(load_base(str(tmp_path / "base"))[0], tmp_path / "one" / "point-00")
    torch.testing.assert_close(logits(adapted.eval(), some_ids()), logits(model, some_ids(), 0.5))


def test_another_base_than_the_one_in_memory_is_refused_when_opened(fitted: Maker, tmp_path: Path) -> None:
    (base, _), task = load_base(str(fitted.base("qwen2"))), made(fitted, "letter")[1]
    with torch.no_grad():
        base.get_input_embeddings().weight.add_(0.5)  # type: ignore[operator]
    lc.save_run(lc.CurveModel.from_config(base, lora_config("qwen2")), task, tmp_path / "run")
    with pytest.raises(lc.UserError, match="expected the base that it was made with, found another"):
        lc.open_run(tmp_path / "run")
