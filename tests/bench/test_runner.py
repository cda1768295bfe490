"""Running suites: the store that they fill, failing cells, a kill in the middle, several processes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.kills import killed
from helpers.made import write_rows
from helpers.suites import WORK, anchored, bytes_of, little

from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.single import Single
from loracurve.baselines.swag import SWAG
from loracurve.bench.config import SuiteConfig
from loracurve.bench.provenance import plain
from loracurve.bench.runner import run_suite
from loracurve.bench.store import STEPS, read_predictions
from loracurve.bench.suite import Cell, cells_of, load_suite
from loracurve.bench.tables.table import Table
from loracurve.bench.tables.write import write_tables
from loracurve.bench.tiny_model import TINY
from loracurve.cli import main
from loracurve.curve.config import LoraOptions
from loracurve.model.config import ModelConfig
from loracurve.system.errors import UserError, is_passing
from loracurve.system.source import Source
from loracurve.training import loop
from loracurve.training.config import LoopConfig


def test_a_suite_fills_its_store(finished: tuple[SuiteConfig, Path]) -> None:
    suite, out = finished
    frame = pd.read_parquet(out / "metrics.parquet")
    assert set(frame.method) == {"one", "ensemble 2", "curve", "ensemble 3"}  # all anchors: what others are measured by
    assert set(frame.set) == {"validation", "test", "train", "shift:other", "ood:other"}
    cells = {c.method: read_predictions(c.folder(out) / "predictions.parquet") for c in cells_of(suite)}
    whole, pair, one = (cells[n].sets["test"].point_log_probs for n in ("ensemble 3", "ensemble 2", "one"))
    assert whole is not None and pair is not None and one is not None
    torch.testing.assert_close(pair, whole[:2], atol=1.01 / STEPS, rtol=0)
    torch.testing.assert_close(one, whole[:1], atol=1.01 / STEPS, rtol=0)
    value = frame[(frame.method == "ensemble 2") & (frame.set == "test") & (frame.metric == "nll")].value.item()
    by_hand = -pair.double().exp().mean(0).log()[torch.arange(24), cells["one"].labels["test"]].mean()
    assert value == pytest.approx(by_hand.item(), abs=1e-9)
    record = json.loads((Cell("made", 0, "curve").folder(out) / "cell.json").read_text())
    assert record["passes"] == 3 and record["cost"] == 7 and record["notes"]["steps"] == 8
    assert not [p for p in out.rglob(WORK)]
    assert (out / "environment.json").is_file() and (out / "tables.md").stat().st_size > 1000


def test_done_cells_are_skipped_and_new_ones_added(finished: tuple[SuiteConfig, Path]) -> None:
    suite, out = finished
    said: list[str] = []
    run_suite(suite, out, jobs=1, say=said.append)
    assert said == []
    more = replace(suite, methods=suite.methods | {"last": Single(keep="last")})
    run_suite(more, out, jobs=1, say=said.append)
    assert [s.partition(":")[0] for s in said] == ["made / seed 0 / last"]
    with pytest.raises(UserError, match="curve was made with other options"):
        run_suite(replace(suite, methods={"curve": anchored(units=1)}), out, jobs=1)
    with pytest.raises(UserError, match="made with other options"):
        write_tables(replace(suite, samples=2), out)


def test_a_failing_cell_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    suite = little(tmp_path, methods={"too many": Ensemble(4), "one": Single()})
    said: list[str] = []
    without = r"out: cells without results: 1 failed \(made / seed 0 / too many: expected 1 to 3 anchors.*--retry"
    with pytest.raises(UserError, match=without):
        run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    assert "failed: expected 1 to 3 anchors" in said[0] and "fitted" in said[1]
    tables = {t.name: t for t in write_tables(suite, tmp_path / "out")}
    assert [row[2] for row in tables["left_out"].rows] == ["too many"]
    assert {row[1] for row in tables["summary"].rows} == {"one", "ensemble 3"}
    said.clear()
    with pytest.raises(UserError, match=without):  # skipped, and named again
        run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    assert said == []
    with pytest.raises(UserError, match=without):
        run_suite(suite, tmp_path / "out", jobs=1, retry=True, say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_lack_of_memory_passes_and_other_faults_of_a_device_break_a_cell(
    error: Exception, passing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = little(tmp_path, methods={"one": Single()})

    def fit(self: Single, setting: Any) -> Any:
        raise error

    monkeypatch.setattr(Single, "fit", fit)
    said: list[str] = []
    kind, told = (UserError, "1 could not run now") if passing else (RuntimeError, "1 cells broke: made / seed 0 / one")
    with pytest.raises(kind, match=told):
        run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    if passing:
        assert said[0] == "made / seed 0 / one: not now: the device ran out of memory"
    assert not (Cell("made", 0, "one").folder(tmp_path / "out") / "cell.json").exists()


@pytest.mark.parametrize("place", ["cell", "anchors"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_nothing_behind(
    place: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With space again the same command makes what was missing."""
    suite, out, said = little(tmp_path, methods={"one": Single()}), tmp_path / "out", list[str]()
    replaced = os.replace

    def full(source: Any, target: Any) -> None:
        if f"/{place}" in str(target) or (place == "cell" and "predictions" in str(target)):
            raise OSError(code, os.strerror(code))
        replaced(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"2 could not run now \(.*one.*\): the same command tries them again"):
        run_suite(suite, out, jobs=1, say=said.append)
    assert all(": not now: cannot write" in line for line in said) and not list(out.rglob("failed.json"))
    assert not list(out.rglob("cell.json"))
    monkeypatch.undo()
    said.clear()
    run_suite(suite, out, jobs=1, say=said.append)
    assert len(said) == 2 and all("predicted" in line for line in said)


def test_what_passes_and_what_does_not() -> None:
    def behind(cause: BaseException) -> BaseException:
        try:
            try:
                raise cause
            except BaseException as error:
                raise UserError("told") from error
        except UserError as told:
            return told

    class ConnectError(Exception):
        """As httpx has it."""

    for passing in (OSError(errno.ENOSPC, "full"), ConnectError("no route"), MemoryError(), TimeoutError()):
        assert is_passing(passing) and is_passing(behind(passing))
    for lasting in (FileNotFoundError(errno.ENOENT, "none"), PermissionError(errno.EACCES, "no"), ValueError("x")):
        assert not is_passing(lasting) and not is_passing(behind(lasting))


def test_anchors_that_fail_are_tried_once(tmp_path: Path) -> None:
    suite = little(tmp_path, training=LoopConfig(steps=3, batch_size=4, learning_rate=1e30, evaluate_every=3))
    said: list[str] = []
    with pytest.raises(UserError, match="4 failed"):
        run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    assert len(said) == 4 and all("failed: the anchors: the loss is not finite at step" in s for s in said)
    failed = tmp_path / "out" / "anchors" / "made" / "0" / "failed.json"
    reason = json.loads(failed.read_text())["reason"]
    failed.write_text(failed.read_text().replace("the loss is not finite", "as found before: the loss is not finite"))
    (Cell("made", 0, "one").folder(tmp_path / "out") / "cell.json").unlink()
    with pytest.raises(UserError, match="4 failed"):
        run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    assert "as found before" in said[4] and len(said) == 5
    with pytest.raises(UserError, match="4 failed"):
        run_suite(suite, tmp_path / "out", jobs=1, retry=True, say=said.append)
    assert json.loads(failed.read_text())["reason"] == reason and len(said) == 9


def test_a_store_without_its_anchors_takes_further_methods(finished: tuple[SuiteConfig, Path], tmp_path: Path) -> None:
    suite, whole = finished
    out = shutil.copytree(whole, tmp_path / "out")
    there = bytes_of(out)
    for tensors in out.glob("anchors/*/*/anchors.safetensors"):
        tensors.unlink()
    run_suite(replace(suite, methods=suite.methods | {"again": Single()}), out, jobs=1, say=str)
    for seed in suite.seeds:
        one, again = (
            read_predictions(Cell("made", seed, name).folder(out) / "predictions.parquet").sets
            for name in ("one", "again")
        )
        torch.testing.assert_close({n: p.probs for n, p in again.items()}, {n: p.probs for n, p in one.items()})
    after = bytes_of(out)
    assert all(after[name] == value for name, value in there.items() if name != "suite.yaml")


def test_time_that_is_up_leaves_cells_for_later(tmp_path: Path) -> None:
    suite = little(tmp_path)
    said: list[str] = []
    run_suite(suite, tmp_path / "out", jobs=1, seconds=0, say=said.append)
    assert len(said) == 4 and all("left for later" in s for s in said)
    assert write_tables(suite, tmp_path / "out")[-1].name == "left_out"


def test_shifted_sets_need_the_same_classes(tmp_path: Path) -> None:
    suite = little(tmp_path)
    meta = json.loads((tmp_path / "other" / "meta.json").read_text())
    (tmp_path / "other" / "meta.json").write_text(json.dumps(meta | {"labels": ["yes", "no"]}))
    said: list[str] = []
    with pytest.raises(UserError, match="4 failed"):
        run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    assert len(said) == 4 and all("expected the classes of made" in s for s in said)


def test_a_killed_suite_goes_on_to_the_same_bytes(
    finished: tuple[SuiteConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "BETWEEN_CHECKPOINTS", 0.0)
    reference, whole = finished
    suite, out = tmp_path / "suite.yaml", tmp_path / "out"
    suite.write_text(json.dumps(plain(reference)))

    def bench() -> None:
        assert main(["bench", str(suite), "--out", str(out)]) == 0

    def removes_checkpoints(of: str) -> Callable[[str, str], bool]:
        """The first loop has saved its second checkpoint, and not ended."""
        return lambda name, path: name == "unlink" and fnmatch(path, f"{out}/{of}/checkpoint-*")

    assert killed(bench, removes_checkpoints(f"anchors/made/0/{WORK}"))
    assert list(out.glob(f"anchors/made/0/{WORK}/checkpoint.json")) and not list(out.glob("cells/*/*/*/cell.json"))
    assert killed(bench, removes_checkpoints(f"cells/made/0/curve/{WORK}/training"))
    assert list(out.glob(f"cells/made/0/curve/{WORK}/training/checkpoint.json"))
    assert list(out.glob("cells/*/*/*/cell.json")) and not (out / "metrics.parquet").exists()
    run_suite(reference, out, jobs=1)
    write_tables(reference, out)
    mine, other = bytes_of(out), bytes_of(whole)
    assert {n: b for n, b in mine.items()} == {n: other[n] for n in mine}


def test_several_processes_do_the_same(finished: tuple[SuiteConfig, Path], tmp_path: Path) -> None:
    reference, whole = finished
    suite = replace(reference, data_folder=reference.data_folder)
    said: list[str] = []
    run_suite(suite, tmp_path / "out", jobs=2, say=said.append)
    assert len(said) == 4
    for cell in cells_of(suite):
        mine, other = (read_predictions(cell.folder(o) / "predictions.parquet").sets for o in (tmp_path / "out", whole))
        for name, predictive in mine.items():
            torch.testing.assert_close(predictive.probs, other[name].probs, atol=0.5 / STEPS, rtol=0)


def test_code_that_no_commit_holds_makes_no_evidence(
    finished: tuple[SuiteConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("loracurve.bench.runner", "loracurve.system.environment"):
        monkeypatch.setattr(f"{module}.source", lambda: Source("abc", "0123", changed=True))
    suite = finished[0]
    with pytest.raises(UserError, match="changes that no commit holds; commit them, or say --commit NAME"):
        run_suite(suite, tmp_path / "out", say=str)
    run_suite(*finished, say=str)  # nothing is left to run
    single = replace(suite, methods={"single": Single()}, seeds=[0], anchors=1, references=[], commit="tried by hand")
    run_suite(single, tmp_path / "out", say=str)
    for record in (tmp_path / "out").rglob("cell.json"):
        made_by = json.loads(record.read_text())["environment"]
        assert (made_by["commit"], made_by["code"]) == ("tried by hand", "abc")


def test_tables_of_a_folder_without_a_suite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "smoke", "--out", str(tmp_path), "--tables_only"]) == 2
    assert "expected the folder of a suite that was run, found none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_smoke_suite_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("periodictable")
    code = main(["bench", "smoke", "--out", str(tmp_path / "out"), "--seeds=[3]"])
    printed = capsys.readouterr()
    missing = printed.err.count("failed: Laplace needs laplace-torch") + printed.err.count("failed: IVON needs")
    assert f"{15 - missing} of 15 cells have results" in printed.out and code == (2 if missing else 0)
    before = bytes_of(tmp_path / "out")
    for path in [*(tmp_path / "out" / "tables").iterdir(), tmp_path / "out" / "metrics.parquet"]:
        path.unlink()
    assert main(["bench", "smoke", "--out", str(tmp_path / "out"), "--seeds=[3]", "--tables-only"]) == 0
    assert bytes_of(tmp_path / "out") == before
    assert main(["bench", "--out", str(tmp_path)]) == 2


def quick(method: object) -> object:
    """The method with what two steps allow."""
    if isinstance(method, Ensemble):
        return Ensemble(3)
    if isinstance(method, SWAG):
        return SWAG(collect=2, rank=2)
    if isinstance(method, Curve) and (noise := method.training.get("perturbation")):
        return replace(method, training=method.training | {"perturbation": replace(noise, cycles=1)})
    return method


def test_the_paper_suite_runs_on_the_same_architecture(tmp_path: Path) -> None:
    suite = load_suite("paper")
    kinds = {"winogrande_s", "winogrande_m", "arc_challenge", "arc_easy", "openbookqa", "boolq", "mmlu_anatomy"}
    names = [*suite.tasks, "mmlu_anatomy"]
    for name in names:
        write_rows(tmp_path / name, {"train": 12, "validation": 6, "test": 6}, name in kinds, start=f"{name}: ")
    short = {"steps": None, "batch_size": None}
    suite = replace(
        suite,
        model=ModelConfig(TINY),
        data_folder=str(tmp_path),
        seeds=[1],
        anchors=3,
        samples=2,
        references=[],
        lora=LoraOptions(r=2, lora_alpha=4, target_modules=suite.lora.target_modules),
        training=replace(suite.training, steps=2, batch_size=4, accumulation=2),
        tasks={n: replace(t, max_length=None, **short) for n, t in suite.tasks.items() if n == "openbookqa"},
        methods={n: quick(m) for n, m in suite.methods.items()},
    )
    with contextlib.suppress(UserError):  # methods whose packages are not installed
        run_suite(suite, tmp_path / "out", jobs=1)
    tables = {t.name: t for t in write_tables(suite, tmp_path / "out")}
    failed = tables.get("left_out", Table("", "", [])).rows
    assert all("needs laplace-torch" in str(row[3]) or "needs the package ivon-opt" in str(row[3]) for row in failed)
    done = {row[1] for row in tables["summary"].rows}
    assert done | {row[2] for row in failed} == set(suite.methods) and len(suite.methods) == 35
