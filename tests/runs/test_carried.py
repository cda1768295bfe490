"""What a run knows of unknown inputs, beside exported points and a shared curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.made_runs import Maker, base_folder, command
from helpers.read_runs import assert_same_unknowns, base_of, read
from safetensors.torch import load_file, save_file

from loracurve.curve.hub import UNKNOWNS
from loracurve.runs.carried import carried_unknowns, open_average
from loracurve.runs.run import open_run
from loracurve.runs.share import share_run
from loracurve.system.errors import UserError
from loracurve.system.files import write_json


@pytest.mark.parametrize("scoring", ["letter", "text", "head"])
def test_exported_points_predict_as_their_run_does(
    scoring: str, fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fitted("anchored", scoring)
    capsys.readouterr()
    command("export", folder, "--out", tmp_path / "points")
    assert "with unknowns.json" in capsys.readouterr().out
    run = open_run(folder)
    model, average = open_average(tmp_path / "points", base_of(run))
    assert average.weights.tolist() == run.average().weights.tolist()
    assert_same_unknowns(run, model, average, rounding=1e-3)
    share_run(folder, tmp_path / "curve", "org/tiny")
    assert_same_unknowns(run, *open_average(tmp_path / "curve", base_of(run)))


@pytest.mark.parametrize("which", ["base", "curve"])
def test_a_familiarity_of_one_kind_and_another_place_of_the_base(which: str, fitted: Maker, tmp_path: Path) -> None:
    """The base is one point more or none; its place is no part of what is compared."""
    folder = Path(shutil.copytree(fitted("anchored", "letter"), tmp_path / "run"))
    for name in UNKNOWNS:
        (folder / name).unlink()
    text = (folder / "config.yaml").read_text()
    assert "familiarity: both" in text
    (folder / "config.yaml").write_text(text.replace("familiarity: both", f"familiarity: {which}"))
    command("calibrate", folder)
    assert read(folder / "unknowns.json")["on_base"] == (which == "base")
    command("export", folder, "--out", tmp_path / "points")
    moved = Path(shutil.copytree(fitted.base("qwen2"), tmp_path / "moved"))
    for config in (tmp_path / "points").glob("*/adapter_config.json"):
        write_json(config, read(config) | {"base_model_name_or_path": str(moved)})
    assert_same_unknowns(open_run(folder), *open_average(tmp_path / "points"), rounding=1e-3)


def test_points_of_another_average_have_none(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = fitted("anchored", "letter")
    for option, lines in (("--points=4", 1), ("--best", 2), ("--t=0.5", 2)):
        capsys.readouterr()
        command("export", folder, option, "--out", tmp_path / option)
        said = capsys.readouterr().out
        assert said.count("\n") == lines and ("without unknowns.json" in said) == (lines == 2)
        assert not any((tmp_path / option / name).exists() for name in UNKNOWNS)
        assert carried_unknowns(tmp_path / option) is None
    _, average = open_average(tmp_path / "--points=4", base_of(open_run(folder)))
    assert average.unknowns is None and average.weights.tolist() == [0.25] * 4
    with pytest.raises(UserError, match=r"expected several points, found one, an adapter; load .*point-00 in PEFT"):
        open_average(tmp_path / "--best")
    assert "which are of another average of 3 points, this one has 4" in caplog.text


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / name, read(folder / name) | changes)


def scale(name: str) -> Callable[[Path], None]:
    """Changes the first number of every tensor of a file."""

    def work(folder: Path) -> None:
        tensors = load_file(folder / name)
        save_file({k: v + torch.eye(1, max(v.numel(), 1)).reshape(-1)[: v.numel()].reshape(v.shape).to(v) * 1e-3
                   for k, v in tensors.items()}, folder / name)  # fmt: skip

    return work


def swap(folder: Path) -> None:
    write_json(folder / "index.json", read(folder / "index.json")[::-1])


def outside(name: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        points = read(folder / "index.json")
        write_json(folder / "index.json", [points[0] | {"folder": name}, *points[1:]])

    return work


POINT = "point-01/adapter_model.safetensors"
CHANGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "numbers of the Gaussians": ("points", scale("unknowns.safetensors"), "the unknowns.safetensors that it was made"),
    "numbers of an adapter": ("points", scale(POINT), f"expected the {POINT} that it was made with, found another"),
    "alpha of an adapter": ("points", edit("point-00/adapter_config.json", lora_alpha=64), "adapter_config.json that"),
    "the order of the points": ("points", swap, "expected the index.json that it was made with, found another"),
    "a point elsewhere": ("points", outside("../points"), "expected names of folders beside it, found '../points'"),
    "the folder above": ("points", outside(".."), "expected names of folders beside it, found '..'"),
    "the prior": ("curve", edit("unknowns.json", on_base=False), "expected what loracurve wrote, found it changed"),
    "hashes that are gone": ("curve", edit("unknowns.json", belongs={}), "expected the entry 'belongs.files'"),
    "numbers of the curve": ("curve", scale("control_points.safetensors"), "the control_points.safetensors that it"),
    "a curve's config": ("curve", edit("curve_config.json", more=1), "the curve_config.json that it was made with"),
    "a file less": (
        "curve",
        lambda f: (f / "unknowns.safetensors").unlink(),
        "expected the unknowns.safetensors that it",
    ),
}


@pytest.fixture(scope="module")
def carried(fitted: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("carried")
    command("export", fitted("anchored", "letter"), "--out", root / "points")
    share_run(fitted("anchored", "letter"), root / "curve", "org/tiny")
    return root


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_belong_together_is_refused_in_a_line(change: str, carried: Path, tmp_path: Path) -> None:
    kind, work, message = CHANGES[change]
    folder = Path(shutil.copytree(carried / kind, tmp_path / kind))
    assert carried_unknowns(folder) is not None
    work(folder)
    with pytest.raises(UserError) as said:
        open_average(folder, "nowhere")
    assert message in str(said.value) and str(tmp_path) in str(said.value) and "\n" not in str(said.value)


def test_points_on_another_base_are_refused(carried: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = base_folder(tmp_path / "other", "qwen2")
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"})
    for kind in ("points", "curve"):
        with pytest.raises(UserError, match="expected the base that the (points were|curve was) trained on") as said:
            open_average(carried / kind, str(other))
        assert "\n" not in str(said.value)


def test_a_run_s_own_files_are_not_those_of_a_shared_curve(fitted: Maker, carried: Path, tmp_path: Path) -> None:
    """Of an equal average of another run: only its hashes tell them apart."""
    folder = Path(shutil.copytree(carried / "curve", tmp_path / "curve"))
    other = share_run(fitted("free", "letter"), tmp_path / "other", "org/tiny")
    assert read(other / "unknowns.json")["average"] == read(folder / "unknowns.json")["average"]
    for name in UNKNOWNS:
        shutil.copy(other / name, folder / name)
    with pytest.raises(UserError, match="that it was made with, found another or none; export or share the run again"):
        open_average(folder, "nowhere")
    shutil.copy(fitted("free", "letter") / "unknowns.json", folder / "unknowns.json")
    with pytest.raises(UserError, match="expected the entry 'belongs', found none"):
        open_average(folder, "nowhere")
    assert json.loads((folder / "curve_config.json").read_text())["format"] == 1
