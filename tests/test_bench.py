"""Suites: parsing, the store, failing cells, a kill in the middle, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from made import SHARED, write_rows

from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.single import Single
from loracurve.baselines.swag import SWAG
from loracurve.baselines.temperature import TemperatureScaled
from loracurve.bench import pool
from loracurve.bench.config import SuiteConfig, SuiteTask
from loracurve.bench.memory import NO_MEMORY
from loracurve.bench.pool import visible_gpus
from loracurve.bench.provenance import fingerprint, made_with, options_of, plain
from loracurve.bench.registry import METHODS, method_class, method_name
from loracurve.bench.runner import prepare, run_suite
from loracurve.bench.store import STEPS, _packed, _unpacked, read_predictions, write_predictions
from loracurve.bench.suite import Cell, cells_of, load_suite
from loracurve.bench.suite_files import shipped
from loracurve.bench.tables.table import Table
from loracurve.bench.tables.write import write_tables
from loracurve.bench.tiny_model import TINY, tiny_model
from loracurve.cli import main
from loracurve.curve.config import CurveConfig, LoraOptions
from loracurve.inference.predictive import Predictive
from loracurve.model.config import ModelConfig
from loracurve.system.errors import UserError
from loracurve.system.files import write_json
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.encoding import Encoded, Example
from loracurve.tasks.task import load_task
from loracurve.training.config import LoopConfig

ROOT = Path(__file__).parents[1]
SIZES = {"train": 40, "validation": 20, "test": 24}


def anchored(**options: Any) -> Curve:
    """Through the first three anchors, two points for all rows."""
    return Curve(CurveConfig("anchored"), **{"training": SHARED} | options)


def little(folder: Path, **changes: object) -> SuiteConfig:
    """A suite of seconds on made data."""
    if not (folder / "made").is_dir():
        write_rows(folder / "made", SIZES)
        write_rows(folder / "other", {"train": 2, "validation": 2, "test": 9})
    options: dict[str, object] = {
        "model": ModelConfig(TINY),
        "tasks": {"made": SuiteTask(scoring="label", shift=["other"], ood=["other"])},
        "methods": {"one": Single(), "ensemble 2": Ensemble(2), "curve": anchored(units=4)},
        "data_folder": str(folder),
        "anchors": 3,
        "samples": 3,
        "lora": LoraOptions(r=2, lora_alpha=4),
        "training": LoopConfig(steps=4, batch_size=4, learning_rate=1e-2),
        "train_rows": 10,
    }
    return SuiteConfig(**options | changes)  # type: ignore[arg-type]


def bytes_of(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on when a suite was stopped."""
    files = [*out.glob("cells/**/predictions.parquet"), out / "metrics.parquet", *out.glob("tables/*")]
    return {str(p.relative_to(out)): p.read_bytes() for p in files if not p.name.startswith("costs")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuiteConfig, Path]:
    folder = tmp_path_factory.mktemp("bench")
    suite = little(folder)
    run_suite(suite, folder / "out", jobs=1)
    write_tables(suite, folder / "out")
    return suite, folder / "out"


# ---- suites


@pytest.mark.parametrize("name", shipped("suites"))
def test_shipped_suites_parse(name: str) -> None:
    suite = load_suite(name)
    assert suite.tasks and suite.methods
    assert len({fingerprint(suite, c) for c in cells_of(suite)}) == len(cells_of(suite))


EVIDENCE = Path(__file__).parents[1] / "results" / "suites"


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("*.yaml")), ids=lambda p: p.stem)
def test_suites_of_the_evidence_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EVIDENCE.parents[1])
    suite = load_suite(path)
    assert len({fingerprint(suite, c) for c in cells_of(suite)}) == len(cells_of(suite))


@pytest.mark.parametrize("name", ["default", "blob", "laplace_lora", "authors"])
def test_profiles_parse_and_are_all_that_is_shipped(name: str) -> None:
    assert load_suite("smoke", ["--profile", name]).profile == name
    assert set(shipped("profiles")) == {"default", "blob", "laplace_lora", "authors"}


def test_a_profile_gives_defaults_the_suite_and_the_command_line_change(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "profile: blob\nmodel: {name: m}\ntraining: {steps: 7}\nseeds: [5]\ntasks: {sst2: {ood: [cr]}}\n"
        "methods: {single: , ensemble 3: {method: ensemble}, c: {method: curve, training: {learning_rate: 1e-3}}}\n"
    )
    suite = load_suite(path, ["--training.batch_size=2"])
    assert suite.training == LoopConfig(steps=7, batch_size=2, learning_rate=1e-4, eps=1e-6, keep="last")
    assert suite.seeds == [5] and suite.lora.target_modules == ["q_proj", "v_proj", "lm_head"]
    assert suite.tasks == {"sst2": SuiteTask(ood=["cr"])}
    assert suite.methods == {
        "single": Single(),
        "ensemble 3": Ensemble(3),
        "c": Curve(training={"learning_rate": 1e-3}),
    }
    path.write_text(json.dumps(plain(suite)))
    assert load_suite(path) == suite


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"sst2": {"scoring": "label"}}}, "unknown option task.sst2.scoring; did you mean 'tasks'"),
        ({"tasks": {"sst2": {"scorin": "label"}}}, "tasks.sst2: unknown option scorin; did you mean 'scoring'"),
        ({"tasks": {"sst2": {"scoring": "lm"}}}, "tasks.sst2: scoring: a suite compares predictions of classes"),
        ({"tasks": {"sst2": 3}}, "tasks.sst2: expected options"),
        ({"tasks": {}}, "tasks: expected at least one"),
        ({"methods": {"ensembl": {}}}, "method: expected one of .* found 'ensembl'; did you mean 'ensemble'"),
        ({"methods": {"ensemble": {"member": 2}}}, "methods.ensemble: unknown option member; did you mean 'members'"),
        ({"methods": {"c": {"method": "curve", "training": {"step": 2}}}}, "methods.c.training: unknown option step"),
        ({"methods": {"t": {"method": "temperature"}}}, "methods.t: expected only of"),
        ({"methods": {"curve": {"units": 2, "training": {"steps": 3}}}}, "units: expected a positive number and no"),
        ({"references": ["none"]}, "references: expected methods of this suite, found 'none'"),
        ({"seeds": [1, 1]}, "seeds: expected different ones"),
        ({"methods": {"single": {}, "a b": {"method": "single"}, "a_b": {"method": "single"}}}, "too alike"),
        ({"profile": "defaul"}, "profile: expected a YAML file or one of .*did you mean 'default'"),
    ],
)
def test_faults_in_a_suite_are_told_in_one_line(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    good = {"model": {"name": "m"}, "tasks": {"sst2": {}}, "methods": {"single": {}}}
    (tmp_path / "s.yaml").write_text(json.dumps(good | changes))
    with pytest.raises(UserError, match=message) as caught:
        load_suite(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)


def test_methods_have_names_options_with_defaults_and_a_way_to_fit() -> None:
    for name in METHODS:
        kind = method_class(name)
        assert callable(kind.fit) and kind.__doc__
        if name != "temperature":
            assert method_name(kind()) == name


def test_fingerprints_follow_options_and_not_places(tmp_path: Path) -> None:
    suite, cell = little(tmp_path), Cell("made", 0, "curve")
    moved = replace(suite, model=ModelConfig(f"elsewhere/{TINY}"), data_folder="elsewhere")
    assert fingerprint(moved, cell) == fingerprint(suite, cell)
    for changed in (
        replace(suite, samples=4),
        replace(suite, methods=suite.methods | {"curve": anchored(units=3)}),
        replace(suite, training=LoopConfig(steps=5)),
    ):
        assert fingerprint(changed, cell) != fingerprint(suite, cell)
        assert not made_with(options_of(suite, cell), changed, cell)
    assert fingerprint(replace(suite, methods={"curve": anchored(units=4)}), cell) == fingerprint(suite, cell)


def test_records_hold_what_a_curve_leaves_to_the_librarys_defaults(tmp_path: Path) -> None:
    suite, cell = little(tmp_path, methods={"curve": Curve(units=4, training={"eps": 1e-6})}), Cell("made", 0, "curve")
    recorded = options_of(suite, cell)
    training = recorded["method"]["training"]
    assert (training["points"], training["share_points"], training["objective"]["jsd"]) == (1, False, "none")
    assert training["eps"] == 1e-6 and "steps" not in training, "what a fine-tune has too stands with the suite's own"
    assert made_with(recorded, suite, cell)
    inside = replace(suite, methods={"curve": TemperatureScaled(suite.methods["curve"])})
    assert options_of(inside, cell)["method"]["of"] == recorded["method"], "a curve inside another method too"
    training["points"] = 2  # as if it had run when that was the default
    assert not made_with(recorded, suite, cell)


def test_results_stay_usable_when_options_are_added_that_are_off_by_default(tmp_path: Path) -> None:
    suite, cell = little(tmp_path), Cell("made", 0, "curve")
    older = options_of(suite, cell)
    del older["training"]["compile"]  # as recorded before there was such an option
    assert made_with(older, suite, cell)
    assert not made_with(older, replace(suite, training=replace(suite.training, compile=True)), cell)
    older["training"]["steps"] += 1
    assert not made_with(older, suite, cell)


def test_the_tiny_model_is_always_the_same_and_answers_with_single_tokens() -> None:
    (first, tokenizer), (second, _) = tiny_model(), tiny_model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for word in (" A", " Z", " negative", " positive", " no"):
        assert len(tokenizer(word)["input_ids"]) == 1


# ---- the store


def test_predictions_come_back_but_for_a_small_step_of_log_odds(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = {"validation": 500, "test": 1500, "train": 500, "ood:x": 1000}
    sets = {
        n: Predictive.from_log_probs((4 * torch.randn(10, e, 3, generator=draw)).log_softmax(-1))
        for n, e in rows.items()
    }
    assert sets["test"].point_log_probs is not None
    sets["test"].point_log_probs[:, 5, 2] = -torch.inf  # a question of two choices
    sets["test"].point_log_probs[:, 5] = sets["test"].point_log_probs[:, 5].log_softmax(-1)
    encoded = {
        n: Encoded([Example(f"{n}-{i}", (), (), i % 2, 2) for i in range(e)], "answer", (0, 1), ("a", "b"), "sum", 0)
        for n, e in rows.items()
    }
    write_predictions(tmp_path / "p.parquet", sets, encoded)
    found = read_predictions(tmp_path / "p.parquet")
    for name, predictive in sets.items():
        mine, other = found.sets[name].point_log_probs, predictive.point_log_probs
        assert mine is not None and other is not None
        torch.testing.assert_close(mine, other, atol=1.01 / STEPS, rtol=0)
        assert torch.equal(mine.argmax(-1), (other - other[..., :1]).mul(STEPS).round().argmax(-1))
        assert found.ids[name] == [e.id for e in encoded[name].examples]
    assert set(found.labels) == {"validation", "test", "train"} and found.labels["test"][:3].tolist() == [0, 1, 0]
    assert (tmp_path / "p.parquet").stat().st_size < 160_000
    write_predictions(tmp_path / "again.parquet", found.sets, encoded)
    for name, predictive in read_predictions(tmp_path / "again.parquet").sets.items():
        assert torch.equal(predictive.point_log_probs, found.sets[name].point_log_probs)  # type: ignore[arg-type]


def test_packed_log_odds_come_back_however_far_they_jump(tmp_path: Path) -> None:
    jumps = torch.tensor([[250.0, -250.0, 250.0, 0.0, 1 / STEPS, -1 / STEPS], [1e4, -1e4, 0.0, 3.5, -3.5, 0.25]])
    found = torch.from_numpy(_unpacked(_packed(jumps[..., None].numpy())))[..., 0]
    limit = (2**15 - 1) / STEPS
    assert torch.equal(found, jumps.clamp(-limit, limit))
    missing = torch.full((2, 3, 2), -torch.inf)
    missing[1, :, 0] = torch.tensor([-255.9, 1.0, -1.0])
    again = torch.from_numpy(_unpacked(_packed(missing.numpy())))
    assert torch.equal(again.isneginf(), missing.isneginf())
    torch.testing.assert_close(again[1, :, 0], missing[1, :, 0], atol=0.5 / STEPS, rtol=0)


# ---- running


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
    assert not [p for p in out.rglob("work-*")]
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
    run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    assert "failed: expected 1 to 3 anchors" in said[0] and "fitted" in said[1]
    tables = {t.name: t for t in write_tables(suite, tmp_path / "out")}
    assert [row[2] for row in tables["left_out"].rows] == ["too many"]
    assert {row[1] for row in tables["summary"].rows} == {"one", "ensemble 3"}
    said.clear()
    run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    assert said == []
    run_suite(suite, tmp_path / "out", jobs=1, retry=True, say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("error", "recorded"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_lack_of_memory_is_a_reason_and_other_faults_of_a_device_are_not(
    error: Exception, recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = little(tmp_path, methods={"one": Single()})

    def fit(self: Single, setting: Any) -> Any:
        raise error

    monkeypatch.setattr(Single, "fit", fit)
    said: list[str] = []
    if recorded:
        run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
        assert said[0] == "made / seed 0 / one: failed: the device ran out of memory"
    else:
        with pytest.raises(RuntimeError, match="1 cells broke: made / seed 0 / one"):
            run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
        assert not (Cell("made", 0, "one").folder(tmp_path / "out") / "cell.json").exists()


def test_anchors_that_fail_are_tried_once(tmp_path: Path) -> None:
    suite = little(tmp_path, training=LoopConfig(steps=3, batch_size=4, learning_rate=1e30, evaluate_every=3))
    said: list[str] = []
    run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    assert len(said) == 4 and all("failed: the anchors: the loss is not finite at step" in s for s in said)
    failed = tmp_path / "out" / "anchors" / "made" / "0" / "failed.json"
    reason = json.loads(failed.read_text())["reason"]
    failed.write_text(failed.read_text().replace("the loss is not finite", "as found before: the loss is not finite"))
    (Cell("made", 0, "one").folder(tmp_path / "out") / "cell.json").unlink()
    run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    assert "as found before" in said[4] and len(said) == 5
    run_suite(suite, tmp_path / "out", jobs=1, retry=True, say=said.append)
    assert json.loads(failed.read_text())["reason"] == reason and len(said) == 9


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
    run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    assert len(said) == 4 and all("expected the classes of made" in s for s in said)


def start(suite: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "loracurve.cli", "bench", str(suite), "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition: object, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None and time.monotonic() < end, "the suite ended before it could be killed"
        time.sleep(0.005)


def test_a_killed_suite_goes_on_to_the_same_bytes(finished: tuple[SuiteConfig, Path], tmp_path: Path) -> None:
    reference, whole = finished
    suite, out = tmp_path / "suite.yaml", tmp_path / "out"
    suite.write_text(json.dumps(plain(reference)))
    first = start(suite, out)
    wait_for(lambda: list((out / "anchors/made/0").glob("work-*/checkpoint.json")), first)  # amid the anchors' training
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not list(out.glob("cells/*/*/*/cell.json"))
    second = start(suite, out)
    wait_for(
        lambda: list((out / "cells/made/0/curve").glob("work-*/training/checkpoint.json")), second
    )  # amid the curve's
    second.send_signal(signal.SIGKILL)
    second.wait()
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


def test_cells_without_memory_run_once_more_when_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = little(tmp_path, methods={"one": Single(), "curve": anchored(), "ensemble 3": Ensemble(3)})
    out, calls, said = tmp_path / "out", [], []
    out.mkdir()
    cells = prepare(suite, out)

    def spread(cells: list[Cell], jobs: int, submit: Any, end: Any, say: Any) -> list[Cell]:
        calls.append((cells, jobs))
        if len(calls) == 1:  # as `Group.run` records it
            for cell, reason in zip(cells, (NO_MEMORY, "another reason"), strict=False):
                record = {"status": "failed", "reason": reason, "options": options_of(suite, cell)}
                write_json(cell.folder(out) / "cell.json", record)
        return cells[2:]

    monkeypatch.setattr(pool, "spread", spread)
    assert pool.run_in_pool(suite, cells, out, 2, None, said.append) == cells[2:]
    assert calls == [(cells, 2), (cells[:1], 1)]
    assert said == ["1 cell found no memory beside others: once more, one at a time"]


def test_tables_of_a_folder_without_a_suite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "smoke", "--out", str(tmp_path), "--tables_only"]) == 2
    assert "expected the folder of a suite that was run, found none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_smoke_suite_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("periodictable")
    assert main(["bench", "smoke", "--out", str(tmp_path / "out"), "--seeds=[3]"]) == 0
    printed = capsys.readouterr()
    missing = printed.err.count("failed: Laplace needs laplace-torch") + printed.err.count("failed: IVON needs")
    assert f"{15 - missing} of 15 cells have results" in printed.out
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
        write_rows(tmp_path / name, {"train": 12, "validation": 6, "test": 6}, choice=name in kinds)
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
    run_suite(suite, tmp_path / "out", jobs=1)
    tables = {t.name: t for t in write_tables(suite, tmp_path / "out")}
    failed = tables.get("left_out", Table("", "", [])).rows
    assert all("needs laplace-torch" in str(row[3]) or "needs the package ivon-opt" in str(row[3]) for row in failed)
    done = {row[1] for row in tables["summary"].rows}
    assert done | {row[2] for row in failed} == set(suite.methods) and len(suite.methods) == 35


def test_local_tasks_of_the_small_suite_have_what_their_prompts_need(shared_data: Path) -> None:
    _, tokenizer = tiny_model()
    for name, task in load_suite("small").tasks.items():
        config = replace(task.to_task(str(shared_data / name)), limit_train=3, limit_validation=3, limit_test=3)
        assert isinstance(config, TaskConfig)
        assert len(load_task(config, tokenizer, 4096).encode("test")) == 3


@pytest.mark.parametrize(
    ("seen", "expected"), [(None, ["0", "1"]), ("2,3", ["2", "3"]), ("GPU-a, GPU-b,GPU-c", ["GPU-a", "GPU-b"])]
)
def test_jobs_get_gpus_of_those_that_the_suite_sees(
    seen: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert visible_gpus(2) == expected
