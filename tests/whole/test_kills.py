"""kill -9 at random events of training, saving and bench: what is left always goes on to the same bits."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.kills import calls_of, ended, finished, forked, killed
from helpers.made_runs import QUICK, base_folder, command, config_file, data_folder
from helpers.suites import WORK, bytes_of, little
from helpers.waiting import until

from loracurve.baselines.single import Single
from loracurve.bench.provenance import plain
from loracurve.bench.runner import run_suite
from loracurve.bench.tables.write import write_tables
from loracurve.cli import main
from loracurve.system import files, tensors
from loracurve.system.errors import UserError
from loracurve.system.files import read_json
from loracurve.system.folders import LOCK, locked
from loracurve.training.checkpoint import LoopState, load_checkpoint, save_checkpoint
from loracurve.training.config import LoopConfig

QUIET: Callable[[str], None] = lambda _: None  # noqa: E731
OFTEN = ["--anchor_training.checkpoint_every=1", "--curve_training.checkpoint_every=1"]


def whole_files_only(folder: Path) -> None:
    """Whatever has its own name is complete, and no lock is left in the way."""
    for path in folder.rglob("*.json"):
        if not path.name.startswith("."):
            json.loads(path.read_text())
    for path in folder.rglob("[!.]*.safetensors"):
        tensors.read_tensors(path)
    with locked(folder):
        assert not list(folder.rglob(".*.tmp")), "unfinished files of killed processes are removed"


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    folder = tmp_path_factory.mktemp("kills")
    base, data = base_folder(folder / "base", "qwen2"), data_folder(folder / "data", "letter")
    config = config_file(folder / "config.yaml", base, data, "letter")
    return lambda out: ["fit", str(config), "--out", str(out), "--resume", *QUICK, *OFTEN]


@pytest.fixture(scope="module")
def run(fit: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An uninterrupted run, and how often one calls the storage."""
    out = tmp_path_factory.mktemp("whole") / "run"
    command(*fit(out))
    return out, calls_of(lambda: command(*fit(out.with_name("again"))))


def results(out: Path) -> dict[str, Any]:
    """Everything that must not depend on when a run was killed."""
    names = [
        "curve/control_points.safetensors",
        "predictions.parquet",
        *(f"anchors/{m}/adapter_model.safetensors" for m in (0, 1)),
    ]
    metrics = read_json(out / "metrics.json")
    history = [read_json(out / part / "history.json") for part in ("anchors", "training")]
    return {n: (out / n).read_bytes() for n in names} | {"metrics": metrics["methods"], "history": history}


def kill_until(
    kills: int, calls: int, seed: int, work: Callable[[Path], object], check: Callable[[Path], None], folder: Path
) -> None:
    """Kill `work` `kills` times, each at one of `calls` calls of the storage; whenever it ends before, `check` what it
    made and begin anew; at last let it end."""
    draw, attempt = random.Random(seed), 0
    while kills:
        out = folder / str(attempt)
        if killed(lambda: work(out), draw.randint(1, calls)):  # noqa: B023
            kills -= 1
            if out.is_dir():
                whole_files_only(out)
        else:
            check(out)
            attempt += 1
    finished(lambda: work(out))
    check(out)


@pytest.mark.parametrize(("seed", "kills", "part"), [(0, 5, 1), (1, 8, 8)])
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bits(
    seed: int, kills: int, part: int, run: tuple[Path, int], fit: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    """Anywhere in what is left of a run, and again and again before much was done."""
    whole, calls = run

    def check(out: Path) -> None:
        assert results(out) == results(whole)

    kill_until(kills, calls // part, seed, lambda out: command(*fit(out)), check, tmp_path)


def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """One step after the other is saved; every kill leaves one of them, whole."""
    factors = [torch.zeros(3, 200, 200, requires_grad=True)]
    optimizer = torch.optim.AdamW(factors, lr=1.0, weight_decay=0.0)
    factors[0].grad = torch.ones_like(factors[0])
    optimizer.step()  # there are moments now

    def state() -> LoopState:
        return LoopState(0, [torch.zeros_like(factors[0])], [math.inf], [0], [0], [])

    def save(folder: Path, start: int, stop: int) -> None:
        for step in range(start, stop):
            with torch.no_grad():
                factors[0].fill_(step)
                optimizer.state[factors[0]]["exp_avg"].fill_(step)
            done = LoopState(
                step,
                [factors[0].detach().clone()],
                [float(step)],
                [step],
                [0],
                [{"step": i + 1, "nll": 0.5} for i in range(step)],
            )
            save_checkpoint(folder, factors, optimizer, done)

    draw, reached, folder = random.Random(0), 1, tmp_path / "kept"
    calls = calls_of(lambda: save(tmp_path / "counted", 1, 6))
    save(folder, 1, 2)
    for _ in range(25):
        assert killed(lambda: save(folder, reached, reached + 7), draw.randint(1, calls))  # noqa: B023
        found = state()
        load_checkpoint(folder, factors, optimizer, found)
        assert found.step >= reached
        assert [p.name for p in folder.glob("checkpoint-*")] == [f"checkpoint-{found.step}.safetensors"]
        for tensor in (factors[0], found.best[0], optimizer.state[factors[0]]["exp_avg"]):
            assert bool((tensor == found.step).all())
        assert found.best_nll == [float(found.step)] and len(found.history) == found.step
        reached = found.step
    assert reached > 25, "many were saved between the kills"
    with locked(folder):
        assert not list(folder.glob(".*.tmp"))


def test_a_suite_killed_at_random_moments_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    suite = little(tmp_path, training=LoopConfig(steps=4, batch_size=4, learning_rate=1e-2, checkpoint_every=1))

    def work(out: Path) -> None:
        run_suite(suite, out, jobs=1, say=QUIET)
        write_tables(suite, out)

    calls = calls_of(lambda: work(tmp_path / "whole"))
    expected = bytes_of(tmp_path / "whole")

    def check(out: Path) -> None:
        assert bytes_of(out) == expected
        assert not list(out.rglob(WORK)), "checkpoints of what is done are gone"

    kill_until(4, calls, 0, work, check, tmp_path / "killed")


def test_leftovers_beside_done_cells_are_removed(tmp_path: Path) -> None:
    suite = little(tmp_path, methods={"one": Single()})
    out = tmp_path / "out"
    run_suite(suite, out, jobs=1, say=QUIET)
    (kept,) = out.glob("cells/made/0/one/predictions.parquet")
    before = kept.read_bytes()
    for folder in (out / "cells" / "made" / "0" / "one", out / "anchors" / "made" / "0"):
        (folder / "work-0123").mkdir()
        (folder / "work-0123" / "checkpoint.json").write_text("{}")
    run_suite(replace(suite, methods={"one": Single(), "two": Single(keep="last")}), out, jobs=1, say=QUIET)
    assert not list(out.rglob(WORK))
    assert kept.read_bytes() == before


@contextlib.contextmanager
def held(folder: Path) -> Iterator[int]:
    """Another process that holds the lock of `folder`; killed in the end."""

    def hold() -> None:
        with locked(folder):
            signal.pause()  # until it is killed

    child = forked(hold)
    lock = folder / LOCK
    try:
        until(lambda: lock.exists() and lock.read_text() == f"{child}\n", "the other process has the lock")
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)


def test_a_second_process_is_kept_out_and_a_killed_one_is_not_in_the_way(
    run: tuple[Path, int], fit: Callable[[Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(run[0], tmp_path / "run"))
    suite = little(tmp_path)
    with held(out) as other:
        for arguments in (fit(out), ["calibrate", str(out)]):
            assert main(arguments) == 2
            said = capsys.readouterr().err
            assert (
                said == f"loracurve: {out} is in use by process {other}; wait until it ends, or choose another --out\n"
            )
        with pytest.raises(UserError, match=f"in use by process {other}"):
            run_suite(suite, out, jobs=1, say=QUIET)
    assert (out / LOCK).exists(), "a killed process leaves the file"
    command(*fit(out))
    assert results(out) == results(run[0]) and not (out / LOCK).exists()


def test_a_fresh_run_may_begin_where_one_was_killed_at_once(fit: Callable[[Path], list[str]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with held(out) as other:
        (out / f".config.yaml.{other}.0123abcd.tmp").write_text("half")
    with held(tmp_path / "elsewhere") as living:
        (out / f".config.yaml.{living}.0123abcd.tmp").write_text("half")
        mine = tmp_path / "run" / ".mine.tmp"
        mine.write_text("not ours")
        with locked(out):
            left = {p.name for p in out.iterdir()} - {LOCK}
        assert left == {mine.name, f".config.yaml.{living}.0123abcd.tmp"}, "files of living processes stay"
    mine.unlink()
    command(*[a for a in fit(out) if a != "--resume"])
    assert (out / "metrics.json").is_file() and not list(out.glob(".*"))


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
def test_disks_that_are_full_or_read_only_cost_one_line(
    fault: int,
    run: tuple[Path, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, out = run[0], tmp_path / "out"
    data = Path(read_yaml_data(whole)) / "test.jsonl"
    suite = tmp_path / "suite.yaml"
    suite.write_text(json.dumps(plain(little(tmp_path, methods={"one": Single()}))))
    run_copy = Path(shutil.copytree(whole, tmp_path / "run"))

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(fault, os.strerror(fault))

    # The disk is full when contents are flushed; a read-only one refuses to make the file.
    monkeypatch.setattr(files.os, "fsync" if fault == errno.ENOSPC else "replace", failing)
    scan = [
        "--points=3",
        "--plane=0",
        "--slopes=0",
        "--sharpness=0",
        "--speeds=0",
        "--resamples=10",
        "--diversity_points=3",
    ]
    for arguments in (
        ["evaluate", run_copy, "--out", out / "e"],
        ["predict", run_copy, data, "--out", out / "p.jsonl"],
        ["export", run_copy, "--t=0.5", "--out", out / "x"],
        ["calibrate", run_copy],
        ["report", run_copy, "--out", out / "r.html"],
        ["scan", run_copy, "--out", out / "s", *scan],
        ["generate", run_copy, "--prompt=it is", "--max_new_tokens=2", "--html", out / "g.html"],
        ["bench", suite, "--out", out / "b"],
    ):
        assert main([str(a) for a in arguments]) == 2, arguments
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("loracurve: cannot write ") and os.strerror(fault) in said, said
        assert "free some space or choose another folder" in said
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def read_yaml_data(run: Path) -> str:
    return str(yaml.safe_load((run / "config.yaml").read_text())["task"]["data"])
