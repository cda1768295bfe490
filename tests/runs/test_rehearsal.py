"""Dry runs: figures as the real run reports them, nothing written, and what does not fit is refused."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from helpers.made_runs import QUICK, Maker, command, tree_hash
from helpers.read_runs import read
from safetensors.torch import load_file

from loracurve.cli import main
from loracurve.model.base_model import load_base
from loracurve.model.curve_model import CurveModel
from loracurve.runs.config import load_config
from loracurve.runs.rehearsal import Rehearsal, _upper_third, rehearse
from loracurve.runs.rehearsal_tables import duration, print_rehearsal, total_time
from loracurve.system.errors import UserError
from loracurve.system.folders import locked
from loracurve.system.memory import DeviceMemory

KINDS = [("free", "letter"), ("anchored", "letter"), ("anchored", "head"), ("anchored", "lm"), ("free", "lm")]


def ticking() -> Any:
    """A clock on which whatever is timed takes a second."""
    return itertools.count().__next__


def rehearsed(run: Path, out: Path, **changes: Any) -> Rehearsal:
    return rehearse(replace(load_config(run / "config.yaml"), **changes), out, clock=ticking())


@pytest.mark.parametrize(("kind", "scoring"), KINDS)
def test_figures_are_those_of_the_real_run(kind: str, scoring: str, fitted: Maker, tmp_path: Path) -> None:
    run = fitted(kind, scoring)
    metrics, found = read(run / "metrics.json"), rehearsed(run, tmp_path / "out")
    assert {name: s.rows for name, s in found.splits.items()} == metrics["task"]["sizes"]
    assert {name: s.cut for name, s in found.splits.items()} == metrics["task"]["truncated"]
    assert found.window == metrics["task"]["window"]
    points = load_file(run / "curve" / "control_points.safetensors")
    numbers = sum(p[0].numel() for p in points.values())
    assert found.adapter_parameters == numbers and {len(p) for p in points.values()} == {found.spec.size}
    assert found.trainable_parameters == numbers * (5 if kind == "free" else 1)
    maps = {re.sub(r"(\.lora_[AB])?\.(weight|bias)$", "", name) for name in points}
    assert sum(found.maps.values()) == len(maps)
    histories = {"curve": run / "training" / "history.json"}
    if kind == "anchored":
        histories = {"anchors": run / "anchors" / "history.json"} | histories
    assert list(found.trainings) == list(histories)
    for name, path in histories.items():
        history, training = read(path), found.trainings[name]
        assert training.steps == len(history) == 4 and training.batch_size == 4
        assert training.epochs == 4 * 4 / 40
        assert training.validations == sum("validation_nll" in entry for entry in history)
    of_run = {name: m["passes"] for name, m in metrics["methods"].items()}
    assert found.passes.items() <= of_run.items()
    read_off = {name for name in of_run if name == "best point" or (scoring != "lm" and re.match(r"adapter \d", name))}
    assert found.passes.keys() == of_run.keys() - read_off


def test_rows_that_are_cut_are_counted(fitted: Maker, tmp_path: Path) -> None:
    options = [fitted.config("letter"), "--curve.kind=free", "--task.max_length=32", *QUICK]
    command("fit", *options, "--out", tmp_path / "run")
    told = read(tmp_path / "run" / "metrics.json")["task"]["truncated"]
    found = rehearsed(tmp_path / "run", tmp_path / "out")
    assert found.window == 32 and max(s.longest for s in found.splits.values()) <= 32
    assert {name: s.cut for name, s in found.splits.items()} == told and sum(told.values()) > 0


def test_nothing_is_written_and_a_later_fit_is_the_same(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = fitted("anchored", "letter"), tmp_path / "new" / "run"
    arguments = ["fit", fitted.config("letter"), "--out", out, "--curve.kind=anchored", *QUICK]
    before = tree_hash(tmp_path), tree_hash(whole)
    capsys.readouterr()
    command(*arguments, "--dry-run")
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "Nothing was written. To run it: the same command without --dry_run"
    for words in ("train          40", "a window of 512", "3 control points, 2 of them anchors", "AdamW's moments"):
        assert words in text
    assert (tree_hash(tmp_path), tree_hash(whole)) == before and not (tmp_path / "new").exists()
    command(*arguments)
    for name in ("curve/control_points.safetensors", "anchors/1/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run", "--dry_run=true"])
def test_the_last_line_is_the_command_that_trains(
    flag: str, fitted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = str(fitted.config("letter")), str(tmp_path / "a run")
    words = ["fit", config, flag, "--out", out, "--curve.kind=free", *QUICK]
    monkeypatch.setattr(sys, "argv", ["loracurve", *words])
    assert main() == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.endswith(f"loracurve fit {config} --out '{out}' --curve.kind=free {' '.join(QUICK)}")


def test_given_adapters_are_not_trained(fitted: Maker, tmp_path: Path) -> None:
    run = fitted("anchored", "head")
    before = tree_hash(run)
    folders = [str(run / "anchors" / str(m)) for m in (0, 1, 0)]
    found = rehearsed(run, tmp_path / "out", adapters=folders)
    assert list(found.trainings) == ["curve"] and "anchors" not in found.seconds
    assert found.spec.size == 5 and found.trainable_parameters == 2 * found.adapter_parameters
    assert found.passes == {"ensemble": 3, "straight line": 3, "aligned line": 3, "curve": 3}
    assert tree_hash(run) == before


def test_rivals_of_a_free_curve_are_trained_too(fitted: Maker, tmp_path: Path) -> None:
    found = rehearsed(fitted("free", "letter"), tmp_path / "out", rivals=3)
    assert list(found.trainings) == ["anchors", "curve"] and found.passes["ensemble"] == 3
    assert found.spec.size == 5 and found.trainable_parameters == 5 * found.adapter_parameters


def test_the_estimate_is_made_of_what_was_timed(fitted: Maker, tmp_path: Path) -> None:
    """Every timed piece takes a second: a step, and a validation of all 24 rows at 4 points (anchors: 2)."""
    run = fitted("anchored", "letter")
    often = replace(load_config(run / "config.yaml").anchor_training, validation_share=None)
    found = rehearsed(run, tmp_path / "out", anchor_training=often)
    tokens = {name: s.rows * s.tokens for name, s in found.splits.items()}
    anchors, curve = found.trainings["anchors"], found.trainings["curve"]
    assert 0 < curve.step <= 1 and 0 < anchors.step <= 1, "of the largest batch, made smaller to the average"
    assert (anchors.validation, curve.validation) == (pytest.approx(1), pytest.approx(1))
    assert found.seconds["anchors"] == 4 * anchors.step and found.seconds["curve"] == 4 * curve.step
    assert found.seconds["validation"] == pytest.approx(4 + 1), "four steps of a curve pay for one"
    token = 1 / (4 * tokens["validation"])
    judged = tokens["validation"] + tokens["test"]
    # Three points and the base, for Gaussians and familiarity.
    assert found.seconds["unknown inputs"] == pytest.approx(4 * (tokens["train"] + tokens["validation"]) * token)
    # The base, two anchors, two lines of three points, three points of the curve with the base beside them.
    assert found.seconds["evaluation"] == pytest.approx((1 + 2 + 6 + 4) * judged * token)


def test_words_of_time() -> None:
    assert [duration(s) for s in (0.4, 42.4, 600, 9000)] == ["under 1 s", "42 s", "10 min", "2.5 h"]
    assert total_time({"curve": 350.0, "validation": 360.0}) == "about 12 min (half of it validation)"
    assert total_time({"anchors": 5.0, "curve": 595.0, "evaluation": 0.0}) == "about 10 min (nearly all of it curve)"
    assert total_time({"curve": 0.1, "validation": 0.2}) == "under 1 s"


def test_long_runs_without_a_gpu_name_a_shorter_one(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(fitted("free", "letter") / "config.yaml")
    base = tf.Qwen2ForCausalLM(
        tf.Qwen2Config(
            vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=7, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    model = CurveModel.from_config(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert _upper_third(model, config) == [5, 6]
    anchored = replace(config, curve=replace(config.curve, kind="anchored"), adapters=["a", "b"])
    assert _upper_third(model, anchored) == []
    assert _upper_third(model, replace(config, lora=replace(config.lora, layers_to_transform=[3]))) == []

    found = rehearsed(fitted("free", "letter"), tmp_path / "out")

    def told(**changes: Any) -> bool:
        print_rehearsal(replace(found, **{"upper": [5, 6], "seconds": {"curve": 900.0}} | changes))
        return "--lora.layers_to_transform='[5, 6]'" in capsys.readouterr().out

    assert told()
    assert not told(seconds={"curve": 90.0}) and not told(upper=[])
    assert not told(memory=replace(found.memory, on_gpu=True))


def test_memory_by_count(fitted: Maker, tmp_path: Path) -> None:
    found = rehearsed(fitted("free", "letter"), tmp_path / "out")
    base, _ = load_base(str(fitted.base("qwen2")))
    weights = {id(t): t.nbytes for t in (*base.parameters(), *base.buffers())}
    state = 4 * 5 * found.adapter_parameters  # float32, five control points
    memory = found.memory
    assert memory.weights == sum(weights.values())
    assert (memory.points, memory.gradients, memory.moments, memory.best) == (state, state, 2 * state, state)
    assert memory.peak is not None and memory.counted < memory.peak < memory.device.total


def _having(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("loracurve.runs.rehearsal.device_memory", lambda device: DeviceMemory(10**9, free))


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("expected a refusal before this")


def test_a_base_that_cannot_fit_is_refused_before_it_is_loaded(
    fitted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = fitted.config("letter")
    monkeypatch.setattr("loracurve.runs.rehearsal.open_parts", _never)
    _having(monkeypatch, 1000)
    assert main(["fit", str(config), "--out", str(tmp_path / "out"), "--dry_run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "fit into the 0.0 MB" in line and "model.dtype bfloat16" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["free", "anchored"])
def test_weights_and_state_that_cannot_fit_are_refused_before_a_step(
    kind: str, fitted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fitted(kind, "letter")
    needed = rehearsed(run, tmp_path / "out").memory.counted
    _having(monkeypatch, needed)
    assert rehearsed(run, tmp_path / "out").memory.counted == needed
    _having(monkeypatch, needed - 1)
    monkeypatch.setattr(torch.optim.AdamW, "step", _never)
    lower = "curve.segments" if kind == "free" else "curve.anchors"
    with pytest.raises(UserError, match=f"of control points.* lower {lower} or lora.r, take model.dtype bfloat16"):
        rehearsed(run, tmp_path / "out")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("part", ["anchor_training", "curve_training"])
def test_a_step_without_memory_says_what_to_lower(
    part: str, error: Exception, fitted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    kind = "anchored" if part == "anchor_training" else "free"

    def step(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    words = ["fit", str(fitted.config("letter")), "--out", str(tmp_path / "out"), f"--curve.kind={kind}", *QUICK]
    assert main([*words, "--dry_run"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    for option in (f"{part}.batch_size", f"{part}.accumulation", "task.max_length", "model.dtype"):
        assert option in line
    assert ("curve.anchors" if kind == "anchored" else "curve.segments") in line


def test_other_errors_of_a_step_are_not_taken_for_it(
    fitted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault of ours")

    run = fitted("free", "letter")
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        rehearsed(run, tmp_path / "out")


def test_what_fit_refuses_is_refused(fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(fitted.config("letter"))

    def told(*words: object) -> str:
        capsys.readouterr()
        assert main(["fit", config, *QUICK, *(str(w) for w in words), "--dry_run"]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    with locked(tmp_path / "used"):
        (tmp_path / "used" / "note").touch()
        assert "exists already" in told("--out", tmp_path / "used")
        (tmp_path / "used" / "note").unlink()
        assert "is in use by process" in told("--out", tmp_path / "used")
    assert "exists already" in told("--out", fitted("free", "letter"))
    assert "found --resume" in told("--out", tmp_path / "out", "--resume")
    adapters = json.dumps([str(fitted("anchored", "head") / "anchors" / str(m)) for m in (0, 1)])
    assert "adapter" in told("--out", tmp_path / "out", f"--adapters={adapters}")
    assert "max_length: expected at most the model's window" in told("--out", tmp_path / "out", "--task.max_length=999")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["objective.jsd=hinge", "objective.weight=1"],
        ["perturbation.kind=lora_space", "gradient_checkpointing=true"],
        ["perturbation.kind=sam", "points=1"],
        ["objective.jsd=bonus", "objective.weight=0.5", "corruption.kind=tokens", "steps=1"],
    ],
    ids=["hinge", "noise", "sam", "corruption"],
)
def test_every_kind_of_training_can_be_tried(options: list[str], fitted: Maker, tmp_path: Path) -> None:
    training = [f"--curve_training.{option}" for option in options]
    command("fit", fitted.config("letter"), "--out", tmp_path / "out", *QUICK, *training, "--dry_run")
    assert not (tmp_path / "out").exists()
