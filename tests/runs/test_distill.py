"""`loracurve distill`: one adapter in place of a curve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from helpers.made_runs import SCORINGS, Maker, command
from helpers.tiny import lora_config, random_points

import loracurve as lc
from loracurve.cli import main
from loracurve.inference.config import UnknownsConfig
from loracurve.runs.config import load_config, save_config
from loracurve.system.files import read_json


def saved(fitted: Maker, scoring: str, folder: Path) -> Path:
    """A run of a curve of drawn points."""
    architecture, head = SCORINGS[scoring], scoring == "head"
    base, tokenizer = lc.load_base(str(fitted.base(architecture)), head, num_labels=2 if head else None)
    task = lc.load_task(lc.TaskConfig(str(fitted.data(scoring)), scoring), tokenizer)  # type: ignore[arg-type]
    model = lc.CurveModel(base, lora_config(architecture))
    model.set_curve(model.spec, random_points(model))
    lc.save_run(model, task, folder, lc.EvaluationConfig(points=3))
    return folder


@pytest.mark.parametrize("scoring", ["letter", "text", "head"])
def test_what_is_written_is_a_run_of_one_point(
    scoring: str, fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out, rows = saved(fitted, scoring, tmp_path / "run"), tmp_path / "one", fitted.data(scoring) / "test.jsonl"
    command("distill", run, "--out", out, "--input", rows, "--steps", 3)
    said = capsys.readouterr().out
    record = read_json(out / "distilled.json")
    counts = {
        name: len((fitted.data(scoring) / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "test")
    }
    assert (record["rows"]["train"], record["rows"]["unlabelled"]) == (counts["train"], counts["test"])
    assert record["passes"] == 3 and record["steps"] == 3
    opened = lc.open_run(out)
    average = opened.average()
    assert (
        average.t.tolist() == [0.5]
        and len(opened.model.control_points()[next(iter(opened.model.control_points()))]) == 1
    )
    validation = opened.task.encode("validation")
    found = average.predict(opened.model, validation).negative_log_likelihood(validation.labels).mean()
    assert record["validation"]["nll"]["distilled"] == pytest.approx(float(found), rel=1e-6)
    assert f"one adapter {record['validation']['nll']['distilled']:.3f}" in said

    twin = lc.open_run(run)
    taught = twin.average().predict(twin.model, validation)
    assert record["validation"]["nll"]["curve"] == pytest.approx(
        float(taught.negative_log_likelihood(validation.labels).mean()), rel=1e-6
    )
    kl = taught.probs.double() * (taught.log_probs.double() - average.predict(opened.model, validation).log_probs)
    assert record["validation"]["kl"] == pytest.approx(float(kl.nansum(1).mean()), abs=1e-6)

    command("predict", out, rows, "--out", tmp_path / "predicted.jsonl")
    assert len((tmp_path / "predicted.jsonl").read_text().splitlines()) == counts["test"]


def test_the_adapter_is_peft_s(fitted: Maker, tmp_path: Path) -> None:
    """Its logits under PEFT are those of the run's one point."""
    out = tmp_path / "one"
    command("distill", saved(fitted, "letter", tmp_path / "run"), "--out", out, "--steps", 2)
    opened = lc.open_run(out)
    ids = torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        own = opened.model(0.5, input_ids=ids).logits
    base, _ = lc.load_base(str(fitted.base(SCORINGS["letter"])))
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, out / "adapter")(input_ids=ids).logits
    torch.testing.assert_close(own, found, atol=1e-5, rtol=1e-5)


def test_its_page_and_card_are_of_one_adapter(fitted: Maker, tmp_path: Path) -> None:
    out = tmp_path / "one"
    command("distill", saved(fitted, "head", tmp_path / "run"), "--out", out, "--steps", 2)
    command("report", out)
    page = (out / "report.html").read_text()
    assert "<p>head with encoder: one adapter</p>" in page
    assert not (out / "figures" / "points_and_average.png").exists(), "one point has no curve to draw"
    command("share", out, "--out", tmp_path / "shared", "--base", "org/tiny")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "| curve | 1 |" in card and "This curve is a single point: one adapter." in card
    assert "- one adapter trained to the averaged probabilities of a curve" in card


def test_the_options_of_unknown_inputs_are_those_of_the_curve(fitted: Maker, tmp_path: Path) -> None:
    run, out = saved(fitted, "letter", tmp_path / "run"), tmp_path / "one"
    options = UnknownsConfig(gaussians="none", familiarity="curve", measure="cosine", rows=30)
    save_config(replace(load_config(run / "config.yaml"), unknowns=options), run / "config.yaml")
    command("distill", run, "--out", out, "--steps", 1)
    assert load_config(out / "config.yaml").unknowns == options
    known = lc.open_run(out).average().unknowns
    assert known is not None and known.gaussians is None
    assert known.familiarity is not None and known.familiarity.measure == "cosine"
    (out / "unknowns.json").unlink()
    (out / "unknowns.safetensors").unlink()
    command("calibrate", out, "--risk=.9")
    again = lc.open_run(out).average().unknowns
    assert again is not None and again.gaussians is None, "what is built again is built as it was"


def test_what_cannot_be_distilled_is_refused_in_a_line(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved(fitted, "letter", tmp_path / "run")
    capsys.readouterr()
    for words, message in (
        ([run], "expected --out FOLDER"),
        ([tmp_path, "--out", tmp_path / "one"], "expected a run directory"),
        ([run, "--out", run], "exists already"),
        ([run, "--out", tmp_path / "one", "--steps", "0"], "steps"),
    ):
        assert main(["distill", *map(str, words)]) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.strip().splitlines()) == 1, said
