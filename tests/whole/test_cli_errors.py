"""Input that is wrong: one line on standard error, exit code 2, and nothing that existed is touched."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made_runs import QUICK, SIZES, base_folder, command, config_file, data_folder, tree_hash
from helpers.processes import ran
from safetensors.torch import load_file, save_file

from loracurve.cli import main
from loracurve.runs.config import load_config
from loracurve.system.files import read_json
from loracurve.training.config import LoopConfig
from loracurve.training.loop import learning_rate_factor
from loracurve.training.step import Stepper


class World:
    """A folder with a base, data, a config and a finished run in it; commands write to `out` beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder.parent / "out"
        self.base, self.data = folder / "base", folder / "data"
        self.config, self.run = folder / "config.yaml", folder / "run"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def adapters(self, *folders: Path) -> str:
        return "--adapters=" + json.dumps([str(folder) for folder in folders])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("world") / "world")
    world.folder.mkdir()
    base_folder(world.base, "qwen2")
    data_folder(world.data, "letter")
    # Paths relative to the world, so that its copies are complete in themselves.
    config_file(world.config, Path("base"), Path("data"), "letter")
    with contextlib.chdir(world.folder):
        command("fit", world.config, "--out", world.run, *QUICK)
    return world


@pytest.fixture
def world(
    finished: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> World:
    """A copy to spoil, and the working directory."""
    own = World(Path(shutil.copytree(finished.folder, tmp_path / "world")))
    monkeypatch.chdir(own.folder)
    capsys.readouterr()
    return own


Refused = Callable[..., str]


@pytest.fixture
def refused(world: World, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that has to be refused; returns what it said."""

    def check(*arguments: object) -> str:
        before = tree_hash(world.folder)
        assert main([str(a) for a in arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("loracurve: ") and said.count("\n") == 1 and said.endswith("\n"), said
        assert len(said) < 700 and "Traceback" not in said
        assert tree_hash(world.folder) == before, "what existed stays as it was"
        return said

    return check


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fti"],
            "unknown command 'fti'; did you mean 'fit'.*quickstart, init, fit, evaluate, predict, generate, serve, ",
        ),
        (["--points=3"], "unknown command '--points=3'"),
        (["fit"], "config|out"),
        (["fit", "CONFIG"], "out"),
        (["fit", "--out", "OUT"], "model|config"),
        (["fit", "nowhere.yaml", "--out", "OUT"], "nowhere.yaml"),
        (["fit", "CONFIG", "--out", "OUT", "--curve.anchor=3"], "unknown option curve.anchor; .*'curve.anchors'"),
        (["fit", "CONFIG", "--out", "OUT", "--curve_training.step=3"], "did you mean 'curve_training.steps'"),
        (["fit", "CONFIG", "--out", "OUT", "--lora.rank=3"], "unknown option lora.rank"),
        (["fit", "CONFIG", "--out", "OUT", "--curve.anchors=three"], "curve.anchors.*three"),
        (["fit", "CONFIG", "--out", "OUT", "--curve.kind=loose"], "curve.kind.*anchored.*loose"),
        (["fit", "CONFIG", "--out", "OUT", "--evaluation.weights=likely"], "evaluation.weights.*likelihood.*likely"),
        (["fit", "CONFIG", "--out", "OUT", "--task.scoring=lettre"], "scoring.*letter.*lettre"),
        (["fit", "CONFIG", "--out", "OUT", "--curve.anchors=1"], "curve.anchors: expected at least 2, found 1"),
        (["fit", "CONFIG", "--out", "OUT", "--curve.degree=1"], "curve.degree: expected at least 2"),
        (["fit", "CONFIG", "--out", "OUT", "--curve.kind=free", "--curve.segments=0"], "segments.*0"),
        (["fit", "CONFIG", "--out", "OUT", "--curve.kind=free", "--adapters=[a,b]"], "set curve.kind to anchored"),
        (
            ["fit", "CONFIG", "--out", "OUT", "--curve_training.steps=0"],
            "curve_training.steps: expected a whole number >= 1, found 0",
        ),
        (
            ["fit", "CONFIG", "--out", "OUT", "--curve_training.points=0"],
            r"points: expected a whole number in \[1, 100000\], found 0",
        ),
        (["fit", "CONFIG", "--out", "OUT", "--curve_training.objective.weight=0.5"], "objective.weight: expected 0"),
        (
            ["fit", "CONFIG", "--out", "OUT", "--evaluation.points=0", "--anchor_training.steps=1"],
            r"points: expected a whole number in \[1, 100000\], found 0",
        ),
        (["evaluate"], "run"),
        (["evaluate", "RUN", "--point=3"], "unknown option point; did you mean 'points'"),
        (["evaluate", "RUN", "--points=many"], "points.*many"),
        (["evaluate", "RUN", "--points=0"], r"points: expected a whole number in \[1, 100000\], found 0"),
        (["evaluate", "RUN", "--weights=likely"], "weights.*likelihood.*likely"),
        (["evaluate", "RUN", "--split=tset"], "no split 'tset'.*did you mean 'test'"),
        (["evaluate", "RUN", "--task=nowhere"], "nowhere"),
        (["evaluate", "RUN", "extra"], "extra"),
        (["export", "RUN"], "out"),
        (["export", "RUN", "--out", "OUT", "--t=2"], r"t: expected a number in \[0, 1\], found 2"),
        (["export", "RUN", "--out", "OUT", "--t=0.5", "--points=2"], "expected one of --points, --best and --t"),
        (["export", "RUN", "--out", "OUT", "--best", "--points=2"], "expected one of --points, --best and --t"),
        (["calibrate", "RUN", "--risk=2"], r"risk: expected a number in \(0, 1\), found 2"),
        (["calibrate", "RUN", "--alpha=0"], r"alpha: expected a number in \(0, 1\), found 0"),
        (["calibrate", "RUN", "--measure=variance"], "measure.*entropy.*variance"),
        (["predict", "RUN"], "input"),
        (["predict", "RUN", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_are_wrong(arguments: list[str], message: str, world: World, refused: Refused) -> None:
    names = {"CONFIG": str(world.config), "OUT": str(world.out), "RUN": str(world.run)}
    said = refused(*(names.get(a, a) for a in arguments))
    assert re.search(message, said), said
    assert not world.out.exists() or not any(world.out.iterdir()), "nothing is left in the way of a second try"


def test_a_real_process_says_one_line_and_exits_with_2(world: World) -> None:
    missing = world / "missing"
    done = ran([sys.executable, "-m", "loracurve.cli", "evaluate", missing])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"loracurve: {missing}: expected a run directory with a fitted curve, found none; make one with loracurve fit\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [unclosed", "config.yaml|YAML|yaml|pars"),
        ("model: {name: x}\ntask: {data: d, scoring: letter}\ncurve: {anchor: 3}\n", "unknown.*anchor.*anchors"),
        ("model: {name: x}\ntask: {data: d, scoring: letter}\nanchors: 3\n", "unknown option anchors"),
        ("model: {name: x}\ntask: {data: d, scoring: letter}\nlora: {r: eight}\n", "lora.r.*eight"),
        ("model: {name: x}\ntask: {scoring: letter}\n", "data"),
        ("task: {data: d, scoring: letter}\n", "model"),
        ("just words\n", "expected|pars"),
        ("", "model|task"),
        (
            "model: {name: x}\ntask: {data: d, scoring: letter}\ncurve: {kind: anchored, anchors: 1}\n",
            "curve.anchors: .*at least 2",
        ),
    ],
)
def test_config_files_that_are_wrong(text: str, message: str, world: World, refused: Refused) -> None:
    path = world / "broken.yaml"
    path.write_text(text)
    said = refused("fit", path, "--out", world.out)
    assert re.search(message, said), said
    assert not world.out.exists()


def spoil_line(path: Path, number: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


def row(**changes: Any) -> str:
    return json.dumps({"id": "x", "question": "it is good", "choices": ["negative", "positive"], "label": 1} | changes)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x", "question": ', "expected one JSON object, found broken JSON"),
        ("[1, 2]", "expected a JSON object"),
        (row(label=2), "expected a label from 0 to 1, found 2"),
        (row(label=-1), "expected a label from 0 to 1, found -1"),
        (row(label="positive"), "expected 'label' as a whole number from 0 to 1, found 'positive'"),
        (row(label=None), "expected a 'label' from 0 to 1, found none"),
        (row(choices=["one"]), "expected 2 to 3 choices, found 1"),
        (row(question=" "), "expected 'question' as text that is not blank"),
        (row(id=7.5), "expected a string 'id', found 7.5"),
        (row(id="SPLIT-0"), "id 'SPLIT-0' was used on line 1 already"),
    ],
)
def test_rows_that_are_wrong_are_named_by_line(
    line: str, message: str, split: str, world: World, refused: Refused
) -> None:
    spoil_line(world.data / f"{split}.jsonl", 3, line.replace("SPLIT", split))
    said = refused("fit", world.config, "--out", world.out, *QUICK)
    assert f"{split}.jsonl, line 3: {message.replace('SPLIT', split)}" in said


def test_data_folders_that_are_incomplete(world: World, refused: Refused) -> None:
    fit = ["fit", world.config, "--out", world.out, *QUICK]

    assert "nowhere" in refused(*fit, "--task.data=nowhere")
    assert "did you mean 'sst2'" in refused(*fit, "--task.data=sst")
    (world.data / "test.jsonl").write_text("\n")
    assert "test.jsonl: expected at least one row, found an empty file" in refused(*fit)
    (world.data / "test.jsonl").unlink()
    assert "found no file" in refused(*fit)
    (world.data / "meta.json").write_text("{")
    assert "broken JSON" in refused(*fit)
    (world.data / "meta.json").unlink()
    (world.data / "train.jsonl").unlink()
    assert "meta.json, found none" in refused(*fit)


def test_answers_that_are_no_single_token(world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_folder(world / "classes", "label")
    fit = ["fit", world.config, "--out", world.out, f"--task.data={data}", "--task.scoring=label", *QUICK]
    answers = ["--task.prompt=Text: {text}\nLabel:", '--task.answers=["quite unlikely", "positive"]']
    with monkeypatch.context() as loading:
        loading.setattr("loracurve.runs.run.open_base", lambda *_: pytest.fail("a model was loaded for nothing"))
        said = refused(*fit, *answers)
    assert "' quite unlikely': expected exactly one token after the prompt" in said and "scoring: text" in said
    # The mistake is mended and the same folder is good for it: nothing has been computed that could be lost.
    command(*fit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task.scoring=lm"], "scoring: expected one that suits multiple_choice data"),
        (["--task.template=choice_leter"], "template: expected one of .*did you mean 'choice_letter'"),
        (["--task.prompt={qestion}"], "prompt: expected fields .*did you mean 'question'"),
        (["--task.max_length=100000"], "max_length: expected at most the model's window of 512"),
        (["--task.max_length=2"], "window of 2"),
        (["--model.name=nowhere/at-all"], "cannot load the tokenizer of 'nowhere/at-all'"),
        (["--lora.target_modules=[nothing_here]"], "LoRA targets do not fit this model"),
        (["--evaluation.ood=[nowhere]"], "nowhere"),
        (["--evaluation.quadrature=gauss-legendre", "--curve.anchors=3"], "points: expected a multiple of the 2"),
    ],
)
def test_options_that_do_not_fit_data_or_model(
    options: list[str], message: str, world: World, refused: Refused
) -> None:
    said = refused("fit", world.config, "--out", world.out, *QUICK, *options)
    assert re.search(message, said), said
    assert not (world.out / "anchors").exists(), "found out before training"


def test_prompts_longer_than_the_window_are_counted(world: World, caplog: pytest.LogCaptureFixture) -> None:
    path = world.data / "train.jsonl"
    for number in (2, 5, 9):
        spoil_line(path, number, row(id=f"long-{number}", question="it was good " * 300))
    with caplog.at_level(logging.WARNING, "loracurve"):
        command("fit", world.config, "--out", world.out, *QUICK)
    said = [record.getMessage() for record in caplog.records if record.name == "loracurve"]
    assert [line for line in said if "cut" in line] == [
        "data, train: 3 of 40 prompts were cut on the left to fit 512 tokens"
    ]
    assert read_json(world.out / "metrics.json")["task"]["truncated"] == {"train": 3, "validation": 0, "test": 0}


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_rank(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    wide = {n: torch.cat([t, t], dim=0 if "lora_A" in n else 1) for n, t in tensors.items()}
    save_file(wide, folder / "adapter_model.safetensors")
    change_json(folder / "adapter_config.json", r=4)


def other_base(folder: Path) -> None:
    change_json(folder / "adapter_config.json", base_model_name_or_path="another/model")


def other_targets(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if "q_proj" not in n}, folder / "adapter_model.safetensors")


def other_shape(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_A" in n)
    save_file(tensors | {name: tensors[name][:1].contiguous()}, folder / "adapter_model.safetensors")


def pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def damaged(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def another_method(folder: Path) -> None:
    change_json(folder / "adapter_config.json", use_dora=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_rank, "r is 4, but 2 in .*anchors must agree"),
        (other_base, "base_model_name_or_path is 'another/model', but .*anchors must be of one base"),
        (other_targets, "adapters have different targets: .*q_proj"),
        (other_shape, "adapters have different shapes at "),
        (pickle_only, "no adapter_model.safetensors .*is a pickle, which is never read"),
        (damaged, "the adapter cannot be read"),
        (another_method, "use_dora is not supported"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "found no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "the adapter cannot be read"),
    ],
)
def test_adapters_that_do_not_go_together(
    spoil: Callable[[Path], None], message: str, world: World, refused: Refused
) -> None:
    first, second = world.run / "anchors" / "0", world.run / "anchors" / "1"
    spoil(second)
    said = refused("fit", world.config, "--out", world.out, *QUICK, world.adapters(first, second))
    assert re.search(message, said), said
    assert str(second) in said or "adapter 1" in said, "the one that is wrong is named"


def test_a_single_adapter_makes_no_curve(world: World, refused: Refused) -> None:
    said = refused("fit", world.config, "--out", world.out, *QUICK, world.adapters(world.run / "anchors" / "0"))
    assert "at least 2 adapter folders, found 1" in said


def change_tensors(run: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = run / "curve" / "control_points.safetensors"
    save_file(change(load_file(path)), path)


def lose_a_tensor(run: Path) -> None:
    change_tensors(run, lambda points: {n: p for n, p in points.items() if n != min(points)})


def change_a_shape(run: Path) -> None:
    change_tensors(run, lambda points: points | {min(points): points[min(points)][:2].contiguous()})


def add_a_tensor(run: Path) -> None:
    change_tensors(run, lambda points: points | {"extra.lora_A.weight": points[min(points)].clone()})


def cut_short(run: Path) -> None:
    path = run / "curve" / "control_points.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def later_format(run: Path) -> None:
    change_json(run / "curve" / "curve_config.json", format=99)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_a_tensor, "control points: expected .* found it missing"),
        (change_a_shape, r"control points: expected .* of shape .* found it of shape \[2"),
        (add_a_tensor, "control points: unknown tensor extra.lora_A.weight"),
        (cut_short, "damaged safetensors file"),
        (later_format, "expected curve format 1 or 2, found 99"),
        (lambda run: (run / "curve" / "control_points.safetensors").unlink(), "found none"),
        (lambda run: (run / "curve" / "curve_config.json").write_text("{}"), "does not describe a curve"),
        (lambda run: (run / "curve" / "curve_config.json").write_text("{"), "not valid JSON"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml: expected a YAML file"),
        (lambda run: shutil.rmtree(run / "curve"), "expected a run directory with a fitted curve, found none"),
    ],
)
def test_runs_that_are_damaged(spoil: Callable[[Path], object], message: str, world: World, refused: Refused) -> None:
    spoil(world.run)
    for arguments in (
        ["evaluate", world.run, "--out", world.out],
        ["predict", world.run, world.data / "test.jsonl", "--out", world.out],
        ["export", world.run, "--out", world.out],
        ["calibrate", world.run],
    ):
        said = refused(*arguments)
        assert re.search(message, said), said
        assert not world.out.exists()


def test_results_are_never_written_over(world: World, refused: Refused) -> None:
    taken, file = world.run / "anchors", world / "notes.txt"
    file.write_text("mine")
    fit = ["fit", world.config, *QUICK]
    test = world.data / "test.jsonl"
    for arguments in (
        [*fit, "--out", world.run],
        [*fit, "--out", taken],
        ["evaluate", world.run, "--out", taken],
        ["export", world.run, "--points=2", "--out", taken],
        ["predict", world.run, test, "--out", file],
        ["predict", world.run, test, "--out", taken],
    ):
        assert "exists already; choose another --out" in refused(*arguments)
    for arguments in ([*fit], ["evaluate", world.run], ["export", world.run, "--points=2"]):
        assert "found a file; choose another --out" in refused(*arguments, "--out", file)
        below = refused(*arguments, "--out", file / "below")
        assert "choose another --out" in below and "notes.txt" in below
    assert "notes.txt" in refused("predict", world.run, test, "--out", file / "below")
    said = refused(*fit, "--out", world.run, "--resume", "--lora.r=3")
    assert "config.yaml: lora.r: expected 2, as it was so far, found 3" in said


def test_calibration_needs_rows_and_classes(world: World, refused: Refused) -> None:
    few = data_folder(world / "few", "letter", SIZES | {"test": 19})
    assert "at least 20 labelled rows, found 19" in refused("calibrate", world.run, f"--input={few / 'test.jsonl'}")
    rows = [json.loads(line) for line in (world.data / "test.jsonl").read_text().splitlines()]
    del rows[4]["label"]
    path = world / "partly.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert "partly.jsonl, line 5: expected a 'label'" in refused("calibrate", world.run, f"--input={path}")
    path.write_text('{"id": "a", "question": "it is"}\n')
    assert "partly.jsonl, line 1: expected 'choices'" in refused("predict", world.run, path)


def test_language_modelling_has_no_classes_to_predict(world: World, refused: Refused) -> None:
    data, out = data_folder(world / "lm", "lm"), world / "lm-run"
    command("fit", config_file(world / "lm.yaml", world.base, data, "lm"), "--out", out, "--curve.kind=free", *QUICK)
    assert "language modelling" in refused("predict", out, data / "test.jsonl")
    assert "language modelling" in refused("calibrate", out)


@pytest.mark.parametrize("part", ["anchor", "curve"])
def test_a_loss_that_is_not_finite_names_the_step_and_a_lower_rate_goes_on(
    part: str, world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [f"--{part}_training.steps=6", f"--{part}_training.checkpoint_every=2"]
    fit = ["fit", world.config, "--out", world.out, *QUICK, *steps]
    folder = world.out / ("anchors" if part == "anchor" else "training")
    step = Stepper.__call__

    def run_away(self: Stepper, parts: Any, factor: float) -> Any:
        result = step(self, parts, factor)
        return result * math.nan if self.config.eps == 1e-7 and factor == factors[-2] else result

    eps = f"--{part}_training.eps=1e-7"
    factors = [learning_rate_factor(LoopConfig(steps=6), number) for number in range(6)]
    kept = f"the last good state, of step 4, is in {folder}; lower learning_rate and go on (fit: --resume)"
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__call__", run_away)
        assert f"the loss is not finite at step 5; {kept}" in refused(*fit, eps)
        assert read_json(folder / "checkpoint.json")["step"] == 4
        assert not (world.out / "metrics.json").exists() and not (world.out / "curve").exists()
        assert "at step 5;" in refused(*fit, eps, "--resume"), "the same wall"
    rate = f"{part}_training.learning_rate"
    assert f"{rate}: expected at most 0.01, as it was so far, found 0.02" in refused(
        *fit, eps, "--resume", f"--{rate}=0.02"
    )
    command(*fit, eps, "--resume", f"--{rate}=0.001")
    change = {"step": 4, "option": rate, "before": 0.01, "now": 0.001, "part": f"{part}_training"}
    assert read_json(world.out / "metrics.json")["training"]["changes"] == [change]
    assert getattr(load_config(world.out / "config.yaml"), f"{part}_training").learning_rate == 0.001
    rates = [entry["learning_rate"] for entry in read_json(folder / "history.json")]
    assert rates == [f * (0.01 if i < 4 else 0.001) for i, f in enumerate(factors)]
    finished = "learning_rate: expected 0.001, with which all 6 steps were taken, found 0.0001"
    assert finished in refused(*fit, eps, "--resume", f"--{rate}=0.0001")
    assert getattr(load_config(world.out / "config.yaml"), f"{part}_training").learning_rate == 0.001


@pytest.mark.parametrize("when", ["checkpoint", "curve", "predictions"])
def test_no_space_left_is_said_and_what_was_written_stays(
    when: str, world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", world.config, "--out", world.out, *QUICK]
    name = {"checkpoint": "checkpoint-", "curve": "control_points", "predictions": "predictions.parquet"}[when]
    sync = os.fsync

    def full(descriptor: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("loracurve.system.files.os.fsync", full)
        said = refused(*fit)
    assert name in said and "No space left on device; free some space or choose another folder" in said
    assert not [p for p in world.out.rglob("*") if p.name.endswith(".tmp") or name in p.name], "no half-written file"
    command(*fit, "--resume")
    expected, found = (read_json(f / "metrics.json") for f in (world.run, world.out))
    assert found["methods"] == expected["methods"], "with space again the run goes on to the same result"
    capsys.readouterr()


def test_a_calibration_that_cannot_be_written_leaves_the_old_one(
    world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("calibrate", world.run)
    old = (world.run / "calibration.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("loracurve.system.files.os.fsync", full)
    assert "No space left" in refused("calibrate", world.run, "--measure=mutual_information")
    assert (world.run / "calibration.json").read_bytes() == old
