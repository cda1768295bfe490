"""Run directories from one end to the other: what fit writes, resuming, and what is looked at before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from helpers.made_runs import CASES, QUICK, SCORINGS, Maker, base_folder, command, config_file, data_folder, tree_hash
from helpers.places import ROOT
from helpers.read_runs import figures, logits, peft_logits, read, some_ids, table
from helpers.tokenizers_made import bert_style
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from loracurve.cli import main
from loracurve.runs.config import load_config
from loracurve.runs.run import open_run


def test_rivals_of_a_free_curve_are_compared_with_and_change_nothing_of_it(fitted: Maker, tmp_path: Path) -> None:
    alone, out = fitted("free", "letter"), tmp_path / "rivals"
    assert main(["fit", str(alone / "config.yaml"), "--rivals", "2", "--out", str(out)]) == 0
    for name in ("curve/control_points.safetensors", "training/history.json"):
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
    metrics = read(out / "metrics.json")
    rivals = ["adapter 0", "adapter 1", "ensemble", "straight line", "aligned line"]
    assert list(metrics["methods"]) == ["base model", *rivals, "curve"]
    assert metrics["methods"]["curve"] == read(alone / "metrics.json")["methods"]["curve"]
    single, *_ = metrics["comparisons"]
    means = [metrics["methods"][name]["sets"]["test"]["nll"] for name in ("curve", "adapter 0", "adapter 1")]
    assert single["second"] == "single adapter (mean of 2)"
    assert single["nll"]["estimate"] == pytest.approx(means[0] - (means[1] + means[2]) / 2)
    assert (out / "anchors" / "1" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("kind", "rivals", "said"), [("anchored", "2", "whose anchors are rivals enough"), ("free", "1", "at least 2")]
)
def test_rivals_that_make_no_sense_are_refused(
    kind: str, rivals: str, said: str, fitted: Maker, tmp_path: Path, capsys: Any
) -> None:
    config = fitted(kind, "letter") / "config.yaml"
    assert main(["fit", str(config), "--rivals", rivals, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_a_file_of_other_inputs_is_looked_at_before_anchors_are_trained(tmp_path: Path, capsys: Any) -> None:
    base, data = base_folder(tmp_path / "base", "qwen2"), data_folder(tmp_path / "data", "letter")
    config = config_file(tmp_path / "c.yaml", base, data, "letter")
    options = [
        "points=2",
        "share_points=true",
        "objective.jsd=bonus",
        "objective.weight=0.5",
        "corruption.kind=text",
        "corruption.file=none.jsonl",
    ]
    arguments = ["fit", str(config), "--out", str(tmp_path / "out"), *(f"--curve_training.{o}" for o in options)]
    assert main(arguments) == 2
    assert "found no file none.jsonl" in capsys.readouterr().err and not (tmp_path / "out" / "anchors").exists()


@pytest.mark.parametrize(("kind", "scoring"), CASES)
def test_fit_writes_a_whole_run_directory(kind: str, scoring: str, fitted: Maker) -> None:
    out = fitted(kind, scoring)
    config = load_config(out / "config.yaml")
    assert (config.curve.kind, config.task.scoring, config.lora.r) == (kind, scoring, 2)
    environment = read(out / "environment.json")
    assert environment["packages"].keys() >= {"torch", "transformers", "peft"}
    metrics = read(out / "metrics.json")
    others = [] if scoring == "head" else ["base model"]
    if kind == "anchored":
        others += ["adapter 0", "adapter 1", "ensemble", "straight line", "aligned line"]
    elif scoring != "lm":
        others += ["best point"]
    assert list(metrics["methods"]) == [*others, "curve"]
    compared = [name for name in others if not name.startswith("adapter ")]
    single = ["single adapter (mean of 2)"] if kind == "anchored" else []
    if single and scoring != "lm":
        nll = {m: metrics["methods"][m]["tempered"]["validation_nll"] for m in ("adapter 0", "adapter 1")}
        single.append(f"{min(nll, key=nll.__getitem__)} (best on validation)")
    assert [c["second"] for c in metrics["comparisons"]] == single + compared
    assert metrics["average"]["t"] == [0.0, 0.5, 1.0] and sum(metrics["average"]["w"]) == pytest.approx(1)
    assert metrics["task"]["sizes"] == {"train": 40, "validation": 24, "test": 17}
    assert metrics["training"]["steps"] == 4
    looked = metrics["training"]["validation"]
    assert (looked["rows"], looked["of"], looked["times"]) == (24, 24, 1)
    assert all(metrics["methods"][m]["sets"]["test"]["nll"] > 0 for m in metrics["methods"])
    points = load_file(out / "curve" / "control_points.safetensors")
    assert {len(p) for p in points.values()} == {3 if kind == "anchored" else 5}
    if kind == "anchored":
        assert metrics["anchor_distance_delta_w"] > 0
    assert (out / "predictions.parquet").exists() == (scoring != "lm")


@pytest.mark.parametrize("scoring", SCORINGS)
def test_anchors_are_peft_folders_and_the_ends_of_the_curve(scoring: str, fitted: Maker) -> None:
    out = fitted("anchored", scoring)
    opened, ids = open_run(out), some_ids()
    assert opened.model.spec.trainable == (False, True, False)
    assert opened.model.spec.alignment == "balanced+procrustes"
    for m, t in enumerate((0.0, 1.0)):
        expected = peft_logits(opened, out / "anchors" / str(m), ids)
        torch.testing.assert_close(logits(opened.model, ids, t), expected, rtol=1e-4, atol=1e-4)
    assert not (out / "anchors" / "2").exists()


class Interrupted(KeyboardInterrupt):
    """What pressing Ctrl-C does."""


@pytest.mark.parametrize("phase", ["anchors", "curve", "evaluation"])
def test_an_interrupted_run_resumes_to_the_same_result(
    phase: str, fitted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = fitted("anchored", "letter"), tmp_path / "cut"
    arguments = ["fit", str(fitted.config("letter")), "--out", str(out), "--curve.kind=anchored", *QUICK]
    steps = 0
    take_step = torch.optim.AdamW.step

    def step(*args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        # The seventh step is the third of the curve's four.
        if steps == {"anchors": 3, "curve": 7}.get(phase):
            raise Interrupted
        return take_step(*args, **options)

    def write_predictions(*args: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        if phase == "evaluation":
            patch.setattr("loracurve.runs.evaluate.write_run_predictions", write_predictions)
        assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (out / "metrics.json").exists()
    command(*arguments, "--resume")
    assert figures(read(out / "metrics.json")) == figures(read(whole / "metrics.json"))
    assert pq.read_table(out / "predictions.parquet").equals(pq.read_table(whole / "predictions.parquet"))
    for name in ("curve/control_points.safetensors", "anchors/1/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    finished = figures(read(out / "metrics.json"))
    command(*arguments, "--resume")
    assert figures(read(out / "metrics.json")) == finished, "resuming what is done changes nothing"


@pytest.mark.parametrize("scoring", ["letter", "head"])
def test_anchors_that_exist_give_the_curve_that_training_them_gave(scoring: str, fitted: Maker, tmp_path: Path) -> None:
    whole, out = fitted("anchored", scoring), tmp_path / "again"
    before = tree_hash(whole)
    folders = json.dumps([str(whole / "anchors" / str(m)) for m in range(2)])
    command("fit", fitted.config(scoring), "--out", out, f"--adapters={folders}", *QUICK)
    mine, theirs = (load_file(x / "curve" / "control_points.safetensors") for x in (out, whole))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    metrics, expected = (read(x / "metrics.json") for x in (out, whole))
    for method, entry in expected["methods"].items():
        assert metrics["methods"][method]["sets"]["test"]["nll"] == pytest.approx(
            entry["sets"]["test"]["nll"], abs=1e-5
        )
    assert "anchors" not in metrics["seconds"]
    assert tree_hash(whole) == before


def test_weights_that_no_checkpoint_holds_are_the_same_when_a_run_is_opened_again(tmp_path: Path) -> None:
    # A masked language model has no pooler: like the head, transformers draws it when the classifier is loaded.
    tokenizer, base = bert_style(), tmp_path / "base"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    data, out = data_folder(tmp_path / "data", "head"), tmp_path / "run"
    command("fit", config_file(tmp_path / "c.yaml", base, data, "head"), "--out", out, "--curve.kind=free", *QUICK)
    torch.manual_seed(12345)
    command("evaluate", out, "--out", tmp_path / "evaluated")
    for name, row in table(tmp_path / "evaluated").items():
        assert row["probs"] == pytest.approx(table(out)[name]["probs"], abs=1e-5)


CONFIGS = sorted((ROOT / "src" / "loracurve" / "configs").glob("*.yaml"))


def test_anchors_of_a_free_curve_are_said_to_have_no_effect(
    fitted: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command("fit", fitted.config("letter"), "--out", tmp_path / "run", "--curve.kind=free", *QUICK)
    assert "curve.anchors: a free curve has none" in caplog.text
    caplog.clear()
    command("fit", fitted.config("letter"), "--out", tmp_path / "other", *QUICK)
    assert "curve.anchors" not in caplog.text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_run(path: Path, fitted: Maker, tmp_path: Path) -> None:
    config = load_config(path)
    scoring = config.task.scoring
    architecture = "encoder" if scoring == "head" else "llama" if scoring == "text" else "qwen2"
    data = data_folder(tmp_path / "data", scoring if scoring == "text" else "label")
    ood = data_folder(tmp_path / "other", "label", {"train": 1, "validation": 1, "test": 5}, "and ")
    # Only what stands for the real thing is replaced; everything else is the file's.
    small = [f"--{part}_training.{option}" for part in ("anchor", "curve") for option in ("steps=2", "batch_size=3")]
    command(
        *("fit", path, "--out", tmp_path / "run", f"--model.name={fitted.base(architecture)}", f"--task.data={data}"),
        *("--model.dtype=float32", "--task.limit_train=20", "--evaluation.points=4", *small),
        *([f"--evaluation.ood=[{ood}]"] if config.evaluation.ood else []),
    )
    metrics = read(tmp_path / "run" / "metrics.json")
    curve = metrics["methods"]["curve"]
    assert curve["passes"] == 4 and curve["sets"]["test"]["nll"] > 0
    assert metrics["average"]["weights"] == config.evaluation.weights
    points = load_file(tmp_path / "run" / "curve" / "control_points.safetensors")
    anchored = config.curve.kind == "anchored"
    segments = config.curve.anchors - 1 if anchored else config.curve.segments
    assert {len(p) for p in points.values()} == {segments * config.curve.degree + 1}
    assert load_config(tmp_path / "run" / "config.yaml").lora == config.lora


def test_losses_are_logged_where_the_tracker_says(fitted: Maker, tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    out = tmp_path / "run"
    command("fit", fitted.config("letter"), "--out", out, "--tracker=tensorboard", *QUICK)
    logged: dict[str, dict[int, float]] = {}
    for file in out.rglob("events.out.tfevents.*"):
        data, place = file.read_bytes(), 0
        while place < len(data):  # length, its checksum, record, its checksum
            length = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16
            for value in event.summary.value:
                logged.setdefault(value.tag, {})[event.step] = value.simple_value
    for folder, label in (("anchors", "anchors"), ("training", "curve")):
        history = json.loads((out / folder / "history.json").read_text())
        assert logged[f"{label}/loss"] == pytest.approx({entry["step"]: entry["loss"] for entry in history})


def test_a_tracker_that_is_not_installed(fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["fit", str(fitted.config("letter")), "--out", str(out), "--tracker=wandb", *QUICK]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not out.exists()
