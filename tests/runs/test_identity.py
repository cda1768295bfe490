"""A run knows itself again: classes by name, base and tokenizer by their content, wherever folders lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made_runs import QUICK, base_folder, command, config_file, predictions
from helpers.read_runs import read, table
from safetensors.torch import load_file, save_file

from loracurve.cli import main
from loracurve.curve.files import load_adapter
from loracurve.model.base_model import load_base
from loracurve.runs.identity import FORMAT, IDENTITY
from loracurve.runs.run import open_run
from loracurve.serving.config import ServeConfig
from loracurve.serving.engine import Engine

WORDS = {"no": ["bad", "poor", "dull"], "yes": ["good", "great", "fine"], "red": ["so", "plain", "very"]}
LEARN = [*QUICK, "--anchor_training.steps=12", "--curve_training.steps=12"]
SCORINGS = {
    "label": ["--task.scoring=label"],
    "answers": ["--task.scoring=label", "--task.prompt=Word {text}\nAnswer:", '--task.answers=["no", "yes"]'],
    "head": ["--task.scoring=head"],
    "choices": ["--task.scoring=label"],
}


def data_of(folder: Path, labels: list[str], choices: bool = False, only: tuple[str, ...] = ("no", "yes")) -> Path:
    """The same texts whatever the order of the class names; the label is what the word says."""
    folder.mkdir()
    for split, size in (("train", 24), ("validation", 24), ("test", 18)):
        rows = []
        for i in range(size):
            name = only[i % len(only)]
            text, label = f"the film is {WORDS[name][i // 2 % 3]}", labels.index(name)
            row: dict[str, Any] = {"id": f"{split}-{i}", "label": label}
            rows.append(row | ({"question": text, "choices": labels} if choices else {"text": text}))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = "multiple_choice" if choices else "classification"
    (folder / "meta.json").write_text(json.dumps({"task": kind, "labels": labels}))
    return folder


class World:
    """A base, data whose classes are no and yes, and a finished run of each scoring in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.data, self.rows = folder / "base", folder / "data", folder / "rows.jsonl"

    def run(self, scoring: str) -> Path:
        return self.folder / scoring

    def data_for(self, scoring: str) -> Path:
        return self.folder / "questions" if scoring == "choices" else self.data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("world"))
    base_folder(world.base, "qwen2")
    data_of(world.data, ["no", "yes"])
    data_of(world.folder / "questions", ["no", "yes"], choices=True)
    world.rows.write_text("".join(json.dumps({"id": w, "text": f"it was {w}"}) + "\n" for w in ("good", "dull", "so")))
    for scoring, options in SCORINGS.items():
        config = config_file(world.folder / "config.yaml", world.base, world.data_for(scoring), "label")
        command("fit", config, *LEARN, *options, "--out", world.run(scoring))
    return world


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    """A copy to spoil; the configs of its runs still name the first one's folders."""
    return World(Path(shutil.copytree(made.folder, tmp_path / "world")))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loracurve: ")]
        return line

    return run


@pytest.fixture
def predicted(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    return partial(predictions, capsys)


def curve_figures(folder: Path) -> Any:
    return read(folder / "metrics.json")["methods"]["curve"]["sets"]["test"]


@pytest.mark.parametrize("scoring", SCORINGS)
def test_data_with_the_classes_in_another_order_give_the_same_figures(
    scoring: str, made: World, tmp_path: Path
) -> None:
    other = data_of(tmp_path / "other", ["yes", "no"], choices=scoring == "choices")
    command("evaluate", made.run(scoring), "--out", tmp_path / "own")
    command("evaluate", made.run(scoring), "--task", other, "--out", tmp_path / "turned")
    own, turned = table(tmp_path / "own"), table(tmp_path / "turned")
    assert own == turned, "labels and probabilities are in the run's order"
    assert curve_figures(tmp_path / "own") == curve_figures(tmp_path / "turned")
    fitted = read(made.run(scoring) / "metrics.json")["methods"]["curve"]["sets"]["test"]
    assert curve_figures(tmp_path / "turned")["nll"] == pytest.approx(fitted["nll"], abs=1e-6)


def test_relabelled_data_give_relabelled_fits(made: World, tmp_path: Path) -> None:
    other = data_of(tmp_path / "other", ["yes", "no"])
    config = config_file(tmp_path / "config.yaml", made.base, other, "label")
    command("fit", config, *LEARN, *SCORINGS["label"], "--out", tmp_path / "run")
    one, turned = table(made.run("label")), table(tmp_path / "run")
    assert one.keys() == turned.keys()
    for name, row in one.items():
        assert turned[name]["probs"][::-1] == pytest.approx(row["probs"], abs=1e-4)
        assert turned[name]["label"] == 1 - row["label"]


@pytest.mark.parametrize("scoring", ["label", "answers", "head"])
def test_an_edited_meta_json_renames_nothing(
    scoring: str, world: World, made: World, predicted: Any, refused: Any, tmp_path: Path
) -> None:
    before = predicted(made.run(scoring), world.rows)
    run, meta = world.run(scoring), world.data / "meta.json"
    text = (run / "config.yaml").read_text().replace(str(made.data), str(world.data))
    (run / "config.yaml").write_text(text)
    meta.write_text(meta.read_text().replace('["no", "yes"]', '["yes", "no"]'))
    assert predicted(run, world.rows) == before
    command("evaluate", run, "--out", tmp_path / "turned")
    own = read(made.run(scoring) / "metrics.json")["methods"]["curve"]["sets"]["test"]["acc"]
    assert curve_figures(tmp_path / "turned")["acc"] == pytest.approx(1 - own), "label 0 is called yes now"
    meta.write_text(meta.read_text().replace('"yes"', '"indeed"'))
    assert predicted(run, world.rows) == before
    assert "(no, yes), found 'indeed'" in refused("evaluate", run, "--out", tmp_path / "renamed")
    assert "(no, yes), found 'indeed'" in refused("calibrate", run)


def test_some_of_the_classes_do_and_unknown_ones_are_named(
    made: World, refused: Any, predicted: Any, tmp_path: Path
) -> None:
    three = data_of(tmp_path / "three", ["red", "no", "yes"], only=("no", "yes", "red"))
    config = config_file(tmp_path / "config.yaml", made.base, three, "label")
    command("fit", config, *LEARN, *SCORINGS["label"], "--out", tmp_path / "run")
    command("evaluate", tmp_path / "run", "--task", made.data, "--out", tmp_path / "two")
    rows = table(tmp_path / "two")
    assert {row["label"] for row in rows.values()} == {1, 2} and all(len(row["probs"]) == 3 for row in rows.values())
    line = refused("evaluate", made.run("label"), "--task", three, "--out", tmp_path / "none")
    assert "(no, yes), found 'red'" in line and not (tmp_path / "none").exists()


def test_rows_whose_shared_choices_are_turned_are_named_by_their_choices(
    made: World, predicted: Any, refused: Any, tmp_path: Path
) -> None:
    def rows(*choices: str) -> Path:
        path = tmp_path / f"{'-'.join(choices)}.jsonl"
        path.write_text(json.dumps({"id": "x", "question": "the film is good", "choices": choices}) + "\n")
        return path

    assert predicted(made.run("choices"), rows("no", "yes")) == predicted(made.run("choices"), rows("yes", "no"))
    assert "found 'maybe'" in refused("predict", made.run("choices"), rows("maybe", "no"))


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_run_needs_its_data_only_for_its_rows(
    scoring: str, world: World, made: World, predicted: Any, refused: Any, tmp_path: Path
) -> None:
    run, new = world.run(scoring), tmp_path / "new data"
    place = world.data_for(scoring)
    text = (run / "config.yaml").read_text().replace(str(made.data_for(scoring)), str(place))
    (run / "config.yaml").write_text(text)
    identity = read(run / IDENTITY)
    assert identity["data"]["place"] == str(made.data_for(scoring).resolve())
    shutil.move(place, new)
    rows = world.rows
    if scoring == "choices":
        rows = tmp_path / "questions.jsonl"
        rows.write_text(json.dumps({"id": "x", "question": "it was dull", "choices": ["no", "yes"]}) + "\n")
    assert predicted(run, rows) == predicted(made.run(scoring), rows)
    command("export", run, "--points=2", "--out", tmp_path / "points")
    assert Engine(open_run(run), ServeConfig()).describe()["classes"] == ["no", "yes"]
    if scoring != "head":
        command("generate", run, "--prompt", "it was", "--max_new_tokens=2")
    for words in (["export", run, "--best"], ["evaluate", run], ["evaluate", run, "--weights=likelihood"]):
        line = refused(*words, "--out", tmp_path / "none")
        assert "needs the rows that the run was made with" in line and identity["data"]["place"] in line
    assert "needs the rows" in refused("calibrate", run)
    command("calibrate", run, "--input", new / "validation.jsonl")
    command("evaluate", run, "--task", new, "--out", tmp_path / "there")
    own = read(run / "metrics.json")["methods"]["curve"]["sets"]["test"]
    assert curve_figures(tmp_path / "there")["nll"] == pytest.approx(own["nll"], abs=1e-6)


def test_rows_that_changed_since_the_fit_are_told(
    world: World, made: World, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run = world.run("label")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(made.data), str(world.data)))
    command("evaluate", run, "--out", tmp_path / "same")
    assert "trained on" not in caplog.text
    path = world.data / "train.jsonl"
    path.write_text(path.read_text().replace("good", "lovely"))
    command("evaluate", run, "--out", tmp_path / "other")
    assert "the train rows of data are not those that it was trained on" in caplog.text


@pytest.mark.parametrize("scoring", ["label", "head"])
def test_a_base_that_moved_is_named(
    scoring: str, world: World, made: World, predicted: Any, refused: Any, tmp_path: Path
) -> None:
    run, new = world.run(scoring), tmp_path / "new base"
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(made.base), str(world.base)))
    before = predicted(made.run(scoring), world.rows)
    assert predicted(run, world.rows) == before, "an equal base in another folder"
    shutil.move(world.base, new)
    assert "give --base" in refused("predict", run, world.rows)
    assert predicted(run, world.rows, "--base", new) == before
    command("export", run, "--t=0.5", "--base", new, "--out", tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter" / "point-00")[0].base_model_name_or_path == str(new)
    command("evaluate", run, "--base", new, "--out", tmp_path / "evaluated")
    command("calibrate", run, "--base", new)
    command("scan", run, "--base", new, "--points=3", "--plane=0", "--slopes=0", "--sharpness=0", "--resamples=10")
    assert read(run / "scan" / "scan.json")["subject"]["base"] == str(new)


def test_a_base_of_the_hub_is_opened_at_the_commit_of_the_fit(
    world: World, made: World, predicted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies under its name has changed since; a stand-in for the hub holds both."""
    asked = []

    def load(name: str, *options: Any) -> Any:
        asked.append((name, options[-1]))
        return load_base(str(made.base if name == "org/tiny" else name), *options[:-1])

    monkeypatch.setattr("loracurve.runs.run.load_base", load)
    run = world.run("label")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(made.base), "org/tiny"))
    change(run / IDENTITY, lambda values: values["base"].update(name="org/tiny", revision="c0ffee"))
    assert predicted(run, world.rows) == predicted(made.run("label"), world.rows)
    assert predicted(run, world.rows, "--base", world.base) == predicted(made.run("label"), world.rows)
    assert asked == [("org/tiny", "c0ffee"), (str(made.base), None), (str(world.base), None), (str(made.base), None)]


def change(path: Path, edit: Callable[[Any], object]) -> None:
    values = read(path)
    edit(values)
    path.write_text(json.dumps(values))


def spoil_weight(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name] = tensors[name] + 0.01 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def spoil_config(base: Path) -> None:
    change(base / "config.json", lambda values: values.update(rms_norm_eps=0.1))


def swap_tokens(base: Path) -> None:
    def swap(values: Any) -> None:
        vocabulary = values["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    change(base / "tokenizer.json", swap)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_weight, "model.layers.1.self_attn.v_proj.weight has other numbers"),
        (spoil_config, "rms_norm_eps is 0.1 in its config, expected 1e-06"),
        (swap_tokens, "expected the tokenizer that it was made with, found another"),
    ],
)
def test_another_base_of_equal_shapes_is_refused(
    spoil: Callable[[Path], None], said: str, world: World, refused: Any, tmp_path: Path
) -> None:
    spoil(world.base)
    out = tmp_path / "none"
    for command_words in (
        ["predict", world.run("label"), world.rows],
        ["evaluate", world.run("head"), "--out", out],
        ["export", world.run("label"), "--out", out],
        ["generate", world.run("label"), "--prompt", "it"],
        ["scan", world.run("label"), "--out", out],
    ):
        assert said in refused(*command_words, "--base", world.base)
    assert not out.exists()


def test_a_run_folder_that_moved_gives_the_same(made: World, predicted: Any, tmp_path: Path) -> None:
    for scoring in ("label", "head"):
        moved = shutil.copytree(made.run(scoring), tmp_path / "elsewhere" / scoring)
        assert predicted(moved, made.rows) == predicted(made.run(scoring), made.rows)


def test_newer_and_broken_identities_are_refused(world: World, refused: Any) -> None:
    run = world.run("label")
    whole = read(run / IDENTITY)
    assert whole["format"] == FORMAT and whole["task"]["labels"] == ["no", "yes"]
    assert whole["made_with"]["packages"].keys() >= {"loracurve", "torch", "transformers", "peft"}
    change(run / IDENTITY, lambda values: values.update(format=FORMAT + 1))
    for words in (["predict", run, world.rows], ["share", run, "--out", run / "shared", "--base", "org/tiny"]):
        assert f"expected format {FORMAT}, found {FORMAT + 1}; a newer version of loracurve" in refused(*words)
    for edit in (
        lambda values: values.update(format="x"),
        lambda values: values["task"].pop("labels"),
        lambda values: values["task"].update(scoring="guess"),
        lambda values: values.pop("base"),
        lambda values: values["base"].update(weights=3),
        lambda values: values["tokenizer"].clear(),
    ):
        (run / IDENTITY).write_text(json.dumps(whole))
        change(run / IDENTITY, edit)
        assert f"{IDENTITY}: expected what loracurve fit wrote" in refused("predict", run, world.rows)


def test_a_fit_goes_on_only_with_what_it_began_with(world: World, refused: Any, tmp_path: Path) -> None:
    config = config_file(tmp_path / "config.yaml", world.base, world.data, "label")
    out = tmp_path / "run"
    command("fit", config, *LEARN, "--out", out)
    again = ["fit", config, *LEARN, "--out", out, "--resume"]
    command(*again)
    rows = (world.data / "train.jsonl").read_text()
    (world.data / "train.jsonl").write_text(rows.replace("good", "lovely"))
    assert "expected the rows that the run began with, found others" in refused(*again)
    (world.data / "train.jsonl").write_text(rows)
    spoil_weight(world.base)
    assert "expected the base that it was made with" in refused(*again)


def test_adapters_of_another_base_are_no_anchors(
    world: World, made: World, refused: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    command("export", made.run("label"), "--points=2", "--out", tmp_path / "ends")
    ends = [tmp_path / "ends" / f"point-{i:02d}" for i in range(2)]
    config = config_file(tmp_path / "config.yaml", world.base, world.data, "label")

    def fit(out: str) -> list[object]:
        adapters = f"--adapters={json.dumps([str(end) for end in ends])}"
        return ["fit", config, *LEARN, *SCORINGS["label"], adapters, "--out", tmp_path / out]

    def rename(base: str) -> None:
        for end in ends:
            change(end / "adapter_config.json", lambda values: values.update(base_model_name_or_path=base))

    command(*fit("equal"))
    named = read(tmp_path / "equal" / "curve" / "curve_config.json")["lora"]["base_model_name_or_path"]
    assert named == str(world.base), "the base that the curve is on, not the equal one that the adapters name"
    assert "is not compared" not in caplog.text
    other = Path(shutil.copytree(world.base, tmp_path / "other"))
    spoil_weight(other)
    rename(str(other))
    line = refused(*fit("refused"))
    assert "which is another base: model.layers.1.self_attn.v_proj.weight has other numbers" in line
    rename("nobody/knows-this")
    command(*fit("unknown"))
    assert "its base nobody/knows-this is not compared" in caplog.text
