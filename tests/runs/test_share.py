"""Curves go to the hub and come back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from helpers.made_runs import QUICK, base_folder, command, config_file, data_folder, tree_hash
from helpers.places import ROOT
from helpers.read_runs import assert_same_unknowns, base_of
from helpers.tiny import lora_config, random_points, tiny

from loracurve.cli import main
from loracurve.curve import hub as curve_hub
from loracurve.curve.files import FILES
from loracurve.curve.hub import UNKNOWNS
from loracurve.curve.spec import CurveSpec
from loracurve.inference.unknowns import read_unknowns
from loracurve.model.curve_model import CurveModel
from loracurve.report.numbers import rounded
from loracurve.runs.carried import carry_unknowns, open_average
from loracurve.runs.run import open_run
from loracurve.system.errors import UserError
from loracurve.system.files import read_json, write_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What `HfApi` is asked for, and what it would then hold: files by repository."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool | None] = {}
        self.tokens: list[str | None] = []
        self.refuses: Exception | None = None

    def __call__(self, token: str | None = None) -> Hub:
        self.tokens.append(token)
        return self

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> Any:
        if self.refuses:
            raise self.refuses
        assert exist_ok
        self.repositories.setdefault(repo, {})
        self.private[repo] = private
        return SimpleNamespace(repo_id=repo)

    def file_exists(self, repo: str, name: str) -> bool:
        return name in self.repositories[repo]

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> Any:
        for name in allow_patterns:
            self.repositories[repo_id][name] = (Path(folder_path) / name).read_bytes()
        return SimpleNamespace(commit_url=f"hub/{repo_id}/{len(self.repositories[repo_id])}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stub = Hub()
    monkeypatch.setattr(curve_hub, "HfApi", stub)
    return stub


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fitted run of a decoder with anchors, and of a classifier."""
    root, made = tmp_path_factory.mktemp("sharing"), {}
    for scoring, architecture in {"label": "qwen2", "head": "encoder"}.items():
        base = base_folder(root / f"base-{scoring}", architecture)
        config = config_file(root / f"{scoring}.yaml", base, data_folder(root / f"data-{scoring}", scoring), scoring)
        command("fit", config, "--out", root / scoring, *QUICK)
        made[scoring] = root / scoring
    return made


def model_of(run: Path) -> tuple[str, torch.Tensor]:
    """The base of a run, and the logits of its curve at three points."""
    base = yaml.safe_load((run / "config.yaml").read_text())["model"]["name"]
    return base, logits(CurveModel.from_pretrained(run / "curve", base))


def logits(model: CurveModel) -> torch.Tensor:
    with torch.no_grad():
        return model(t=[0.0, 0.4, 1.0], input_ids=torch.arange(3, 12)[None]).logits


def in_cache(cache: Path, repo: str, files: dict[str, bytes]) -> None:
    """The layout in which the hub's library keeps what it has fetched."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)


def test_a_card_tells_what_the_run_recorded(runs: dict[str, Path], tmp_path: Path) -> None:
    run, before = runs["label"], tree_hash(runs["label"])
    command("share", run, "--out", tmp_path / "out", "--base", "org/tiny")
    assert tree_hash(run) == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "control_points.safetensors",
        "curve_config.json",
        "unknowns.json",
        "unknowns.safetensors",
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "org/tiny",
        "library_name": "loracurve",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "bayesian", "uncertainty", "mode-connectivity"],
    }
    metrics = read_json(run / "metrics.json")
    curve = metrics["methods"]["curve"]["sets"]["test"]
    # Header and rows of a table have the same number of columns.
    for table in re.findall(r"(?:^\|.*\|\n)+", body, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    row = next(line for line in body.splitlines() if line.startswith("| curve |"))
    assert f"{curve['nll']:.3f}" in row and f"{curve['acc']:.3f}" in row
    against = metrics["comparisons"][0]
    found = next(line for line in body.splitlines() if line.startswith(f"| {against['second']} | ") and "[" in line)
    assert rounded(against["nll"]) in found
    assert "3 control points in 1 segment of degree 2" in body and "through 2 independently" in body
    assert "train 40, validation 24, test 17 rows" in body and "Text: {text}\nLabel: {label}" in body
    assert "4 steps of 4 examples, learning rate 0.01" in body and "judged on 17 test examples" in body
    written = (tmp_path / "out" / "curve_config.json").read_text() + card
    assert str(run.parent) not in written, "no path of this machine leaves it"


@pytest.mark.parametrize("scoring", ["label", "head"])
def test_the_code_on_the_card_loads_the_curve(
    scoring: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(runs[scoring].parent / f"base-{scoring}")
    command("share", runs[scoring], "--out", tmp_path / "out", "--base", "org/tiny")
    card = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = code.replace("org/tiny", base).replace("FOLDER OR NAME", str(tmp_path / "out"))
    change = json.loads((tmp_path / "out" / "curve_config.json").read_text())
    assert change["lora"]["base_model_name_or_path"] == "org/tiny"
    change["lora"]["base_model_name_or_path"] = base
    (tmp_path / "out" / "curve_config.json").write_text(json.dumps(change))
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), space)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    if scoring == "head":
        assert space["probs"].shape == (2,) and float(space["probs"].sum()) == pytest.approx(1)
        assert torch.equal(logits(space["model"]), logits(open_run(runs[scoring]).model))
    else:
        assert torch.equal(logits(space["model"]), model_of(runs[scoring])[1])


def test_a_run_goes_to_the_hub_and_comes_back(
    runs: dict[str, Path],
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    command("share", runs["label"], "--hub", "me/curve", "--base", "org/tiny", "--private")
    assert capsys.readouterr().out == "Uploaded: hub/me/curve/5\n" and not list(tmp_path.iterdir())
    files = hub.repositories["me/curve"]
    assert hub.private == {"me/curve": True} and sorted(files) == sorted([*FILES[:2], *UNKNOWNS, "README.md"])
    assert b'from_pretrained("me/curve")' in files["README.md"]

    cache = tmp_path / "cache"
    in_cache(cache, "me/curve", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    base, expected = model_of(runs["label"])
    for revision in (None, "main", COMMIT):
        assert torch.equal(logits(CurveModel.from_pretrained("me/curve", base, revision)), expected)
    assert_same_unknowns(open_run(runs["label"]), *open_average("me/curve", base, COMMIT))
    # A folder of that name comes first.
    shutil.copytree(runs["label"] / "curve", tmp_path / "me" / "curve")
    shutil.rmtree(cache)
    assert torch.equal(logits(CurveModel.from_pretrained("me/curve", base)), expected)


def test_a_model_in_memory_keeps_the_card_that_is_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CurveModel(tiny("llama"), lora_config("llama"), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    with pytest.raises(UserError, match="base: expected the base model's name on the hub, found None"):
        model.push_to_hub("me/curve")
    assert model.push_to_hub("me/curve", base="org/tiny", token="secret") == "hub/me/curve/3"
    assert hub.tokens == ["secret"]
    files = hub.repositories["me/curve"]
    assert b"5 control points in 2 segments of degree 2 and is free" in files["README.md"]
    assert b"written without the run" in files["README.md"] and b"## Results" not in files["README.md"]
    files["README.md"] = b"mine"
    model.set_curve(model.spec, random_points(model, seed=2))
    before = dict(files)
    model.push_to_hub("me/curve", base="org/tiny")
    assert files["README.md"] == b"mine" and files["curve_config.json"] == before["curve_config.json"]
    assert files["control_points.safetensors"] != before["control_points.safetensors"]
    assert model.config.base_model_name_or_path is None, "the model itself stays as it is"


def test_what_cannot_be_shared_is_said_in_one_line(
    runs: dict[str, Path], hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = runs["label"], tmp_path / "out"
    fitted = Path(shutil.copytree(run, tmp_path / "unfinished"))
    (fitted / "metrics.json").unlink()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "README.md").write_text("mine")
    named = ["--base", "org/tiny"]
    hub.refuses = huggingface_hub.errors.LocalTokenNotFoundError("no token\nfound")
    for arguments, message in (
        ([run], "expected --out FOLDER or --hub OWNER/NAME, found neither"),
        ([run, "--out", out], "base: expected the base model's name on the hub, found "),
        ([run, "--out", out, "--base", "a/b/c"], "base: expected the base model's name on the hub, found 'a/b/c'"),
        ([run, "--out", taken, *named], "exists already"),
        ([fitted, "--out", out, *named], "expected an evaluated run, found no metrics.json"),
        ([tmp_path / "none", "--out", out, *named], "expected an evaluated run"),
        ([run, "--hub", "me/curve", *named], "me/curve: cannot upload (no token found); is the name OWNER/NAME"),
    ):
        capsys.readouterr()
        assert main(["share", *map(str, arguments)]) == 2, message
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert not out.exists() and (taken / "README.md").read_text() == "mine"
    with pytest.raises(UserError, match="nobody/nothing: expected a curve folder or the name of a repository"):
        CurveModel.from_pretrained("nobody/nothing", tiny("qwen2"))
    with pytest.raises(UserError, match="expected a curve folder, found no curve_config.json"):
        CurveModel.from_pretrained("nothing", tiny("qwen2"))


def test_the_example_of_the_page_runs(
    runs: dict[str, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve, known = Path(shutil.copytree(runs["label"] / "curve", tmp_path / "curve")), read_unknowns(runs["label"])
    assert known is not None
    carry_unknowns(*known, curve)
    in_cache(tmp_path / "cache", "OWNER/NAME", {p.name: p.read_bytes() for p in curve.iterdir()})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "sharing.md").read_text()
    block, second = (part.split("```")[0] for part in text.split("```python\n")[1:])
    pushed = 'push_to_hub("OWNER/OTHER", base="org/tiny")'  # this one's base is a folder
    names: dict[str, Any] = {}
    exec(block.replace('push_to_hub("OWNER/OTHER")', pushed), names)
    assert torch.equal(logits(names["model"]), model_of(runs["label"])[1])
    run = open_run(runs["label"])
    exec(second, names | {"task": run.task})
    assert_same_unknowns(run, *open_average("OWNER/NAME"))
    points = hub.repositories["OWNER/OTHER"]["control_points.safetensors"]
    assert points == (curve / "control_points.safetensors").read_bytes()


def test_what_tells_foreign_rows_goes_along(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gives the predictions of the run, part by part; without it, or with that of another run, one is told so."""
    run, out = open_run(runs["label"]), tmp_path / "out"
    command("share", runs["label"], "--out", out, "--base", "org/tiny")
    model, average = open_average(out, base_of(run))
    assert_same_unknowns(run, model, average)
    command("share", runs["label"], "--out", tmp_path / "without", "--base", "org/tiny", "--without_unknowns")
    assert not any((tmp_path / "without" / name).exists() for name in UNKNOWNS)
    assert "unknowns.json" not in (tmp_path / "without" / "README.md").read_text()
    with pytest.raises(UserError, match="expected unknowns.json, which says which points to average, found none"):
        open_average(tmp_path / "without", base_of(run))
    # Of other points than the run was evaluated at.
    changed = Path(shutil.copytree(runs["label"], tmp_path / "changed"))
    values = read_json(changed / "unknowns.json")
    values["average"][0][0] = 0.25
    write_json(changed / "unknowns.json", values)
    capsys.readouterr()
    assert main(["share", str(changed), "--out", str(tmp_path / "x"), "--base", "org/tiny"]) == 2
    said = capsys.readouterr().err
    assert "unknowns.json: expected Gaussians and familiarity of the 3 points of metrics.json" in said
    assert said.count("\n") == 1 and not (tmp_path / "x").exists()
