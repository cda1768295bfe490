"""What is imported when: the face and the options need no torch, and help and mistakes are told before it is loaded."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import pytest
from helpers.kills import ended, forked
from helpers.places import ROOT
from helpers.processes import ran

import loracurve
from loracurve.cli import main
from loracurve.runs.config import load_config, without_retired_words
from loracurve.system.errors import UserError
from loracurve.system.moved import MODULES, NAMES

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "pandas", "pyarrow", "matplotlib", "fastapi", "ray")
LIGHT = [
    *(
        f"{p}.config"
        for p in ["curve", "tasks", "model", "inference", "training", "landscape", "runs", "serving", "bench"]
    ),
    *("system.options", "system.folders", "system.distributed", "bench.suite_files", "commands", "cli"),
]


def loaded_by(code: str) -> set[str]:
    """The heavy packages that are there after `code`, in a process of its own."""
    show = f"{code}\nimport sys; print('LOADED', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = ran([sys.executable, "-c", show])
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("module", ["", *(f".{name}" for name in LIGHT)])
def test_the_face_and_the_options_import_nothing_heavy(module: str) -> None:
    assert not loaded_by(f"import loracurve{module}")


def test_packages_and_old_modules_are_attributes_and_all_public_names_need_no_extra() -> None:
    """`import loracurve` alone made them attributes when it loaded them all."""
    names = ", ".join(name for name in loracurve.__all__)
    code = f"import loracurve as lc; assert lc.runs and lc.metrics.accuracy\nfrom loracurve import {names}"
    assert not loaded_by(code) & {"fastapi", "ray", "datasets"}


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["fit", "--help"],
        ["bench", "--help"],
        ["fitt"],
        ["fit", "--nope"],
        ["scan", "RUN", "--ponits", "3"],
        ["generate", "RUN", "--promt", "x"],
        ["bench", "smoke", "--nope", "1"],
    ],
)
def test_help_and_mistakes_are_told_before_torch_is_loaded(words: list[str]) -> None:
    code = f"import sys; from loracurve.cli import main; assert main({words!r}) in (0, 2)"
    assert not loaded_by(code)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "--nope"], "unknown option nope"),
        (["bench", "smoke", "--nope", "1"], "unknown option nope"),
        (["fit", "--curve.segmens", "3"], "unknown option curve.segmens; did you mean 'curve.segments'?"),
        (["fit", "--segmnets", "3"], "unknown option segmnets; did you mean 'curve.segments'?"),
        (["fit", "--lerning_rate", "3"], "did you mean 'curve_training.learning_rate'?"),
        (["scan", "RUN", "--ponits", "3"], "unknown option ponits; did you mean 'points'?"),
        (["generate", "RUN", "--promt", "x"], "unknown option promt; did you mean 'prompt'?"),
        (["fitt"], "unknown command 'fitt'; did you mean 'fit'?"),
        (["fit", "--curve.smooth=true"], "curve.smooth: expected none, it did not help (results/NOTES.md)"),
        (["fit", "--curve_training.bootstrap.kind=tied"], "commit 94813ef still has it"),
    ],
)
def test_suggestions_are_near_or_absent(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    found = capsys.readouterr().err.removeprefix("loracurve: ").strip()
    assert found == said if said.startswith("unknown option nope") else said in found


def test_every_public_name_is_there() -> None:
    assert {*loracurve.__all__} <= {*dir(loracurve)}
    for name in loracurve.__all__:
        assert getattr(loracurve, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        loracurve.nope  # noqa: B018


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("sft",)])
def test_modules_are_found_at_their_old_places(module: str) -> None:
    __import__(f"loracurve.{module}")
    old = sys.modules[f"loracurve.{module}"]
    for place in MODULES[module]:
        __import__(f"loracurve.{place}")
        new = sys.modules[f"loracurve.{place}"]
        for name in getattr(new, "__all__", ()):
            with pytest.warns(DeprecationWarning, match=rf"loracurve\.{place}\.{name} now"):
                found = getattr(old, name)
            assert found is getattr(new, name)
            break
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        old.nope  # noqa: B018


@pytest.mark.parametrize("package", NAMES)
def test_packages_hand_on_the_names_that_they_held(package: str) -> None:
    __import__(f"loracurve.{package}")
    for names, place in NAMES[package].items():
        __import__(f"loracurve.{place}")
        for name in names.split():
            with pytest.warns(DeprecationWarning, match="the old place goes in the next version"):
                found = getattr(sys.modules[f"loracurve.{package}"], name)
            assert found is getattr(sys.modules[f"loracurve.{place}"], name)


def test_new_places_warn_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from loracurve.curve import bezier
        from loracurve.landscape import paths

        assert bezier.gram and paths.Path


def test_an_old_module_runs_as_the_new_one(tmp_path: Path) -> None:
    """`python -m loracurve.harness` is the command of `loracurve.runs.lm_eval`, which here misses its program."""

    def program() -> None:
        sys.argv, sys.modules["lm_eval"] = ["harness"], None  # type: ignore[assignment]
        sys.modules.pop("loracurve.harness", None)
        runpy.run_module("loracurve.harness", run_name="__main__", alter_sys=True)

    code, said = ended(forked(program, tmp_path / "said")), (tmp_path / "said").read_text()
    assert code == 2 and "expected the package lm-eval" in said, said


def test_command_lines_with_defaults_of_retired_options_work(tmp_path: Path) -> None:
    """The config.yaml of a run of the version that had more options can be fitted again, and resumed."""
    old = ROOT / "tests" / "helpers" / "config_94813ef.yaml"
    new = without_retired_words(["--config", str(old), "--curve.smooth=false", "--resume", "--lora.r", "4"])
    assert [word.partition("=")[0] for word in new] == ["--config", "--resume", "--lora.r", "4"]
    (tmp_path / "new.yaml").write_text(new[0].partition("=")[2])
    assert load_config(tmp_path / "new.yaml") == load_config(old)
    plain = ["--config", str(tmp_path / "new.yaml"), "--curve_training.sampling=uniform"]
    assert without_retired_words(plain) == plain


@pytest.mark.parametrize("word", ["--curve_training.objective.jsd=mixture", "--curve_training.sampling=quasi-random"])
def test_retired_values_are_refused_on_the_command_line(word: str) -> None:
    with pytest.raises(UserError, match=f"^{word[2:].partition('=')[0]}: .*commit 94813ef still has it"):
        without_retired_words(["--config", "any.yaml", word])
