"""Suites on a Ray cluster: what each cell takes of it, and a local one of two workers of which one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from helpers.places import ROOT
from helpers.suites import bytes_of, little
from helpers.waiting import until

from loracurve.baselines.single import Single
from loracurve.bench.provenance import plain
from loracurve.bench.ray_cluster import shares
from loracurve.bench.runner import run_suite
from loracurve.bench.suite import cells_of
from loracurve.bench.tables.write import write_tables
from loracurve.system.errors import UserError
from loracurve.training.config import LoopConfig


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, object]:
    return {"Alive": alive, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})}


@pytest.mark.parametrize(
    ("nodes", "jobs", "expected"),
    [
        ([node(2)], 0, (1, {"num_cpus": 2})),
        ([node(2)], 2, (2, {"num_cpus": 1})),
        ([node(2)], 5, (5, {"num_cpus": 1})),  # the others wait in Ray's queue
        ([node(3), node(5), node(9, alive=False)], 0, (2, {"num_cpus": 3})),
        ([node(3), node(8)], 3, (3, {"num_cpus": 1})),
        ([node(64, 8), node(4, 1), node(96)], 0, (9, {"num_cpus": 4, "num_gpus": 1})),  # only nodes with GPUs
        ([node(16, 2)], 4, (4, {"num_cpus": 4, "num_gpus": 0.5})),
        ([node(16, 2)], 3, (3, {"num_cpus": 4, "num_gpus": 0.5})),
    ],
)
def test_every_node_holds_its_part_of_the_cells(
    nodes: list[dict[str, object]], jobs: int, expected: tuple[int, dict[str, float]]
) -> None:
    assert shares(nodes, jobs) == expected


def test_what_a_cluster_needs_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = little(tmp_path)
    with pytest.raises(UserError, match="address: expected none without --executor ray, found 'auto'"):
        run_suite(suite, tmp_path / "out", address="auto")
    with pytest.raises(UserError, match="expected a Ray cluster with CPUs"):
        shares([node(0), node(4, alive=False)], 1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"expected the package ray, found none; .*pip install 'loracurve\[ray\]'"):
        run_suite(suite, tmp_path / "out", executor="ray")
    assert not (tmp_path / "out").exists()


def test_no_cluster_at_the_address(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match="address: expected that of a running Ray cluster, found 'auto'"):
        run_suite(little(tmp_path), tmp_path / "out", executor="ray", address="auto")


def workers(driver: psutil.Process) -> dict[str, psutil.Process]:
    """The cells that Ray's workers are at, by the names that it gives their processes."""
    found = {}
    for process in driver.children(recursive=True):
        with_title = ""
        try:
            with_title = process.cmdline()[0]
        except (psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
            continue
        if with_title.startswith("ray::made / "):
            found[with_title.removeprefix("ray::")] = process
    return found


def test_a_worker_that_is_killed_costs_nothing(tmp_path: Path) -> None:
    """Two workers, each at the anchors of one seed; one is killed amid its training, its cell is run again."""
    pytest.importorskip("ray")
    suite = little(tmp_path, methods={"one": Single()}, seeds=[0, 1])
    suite = replace(suite, training=LoopConfig(steps=30, batch_size=4, learning_rate=1e-2, checkpoint_every=2))
    (tmp_path / "suite.yaml").write_text(json.dumps(plain(suite)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "loracurve.cli", "bench", str(tmp_path / "suite.yaml"), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--executor", "ray", "--jobs", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "RAY_ADDRESS": ""},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    driver = psutil.Process(process.pid)
    second = "made / seed 1 / one"
    busy: dict[str, psutil.Process] = {}

    def at_work() -> bool:
        nonlocal busy
        busy = workers(driver)
        begun = list((out / "anchors/made/1").glob("work-*/checkpoint.json"))
        return second in busy and bool(begun)  # the other worker may have begun earlier, and be done

    until(at_work, "a worker amid its anchors", lambda: process.poll() is None, seconds=240)
    assert all("seed 0" in cell for cell in busy if cell != second)  # the other worker may be a cell ahead
    busy[second].send_signal(signal.SIGKILL)
    assert not (out / "anchors" / "made" / "1" / "anchors.json").exists()  # so it was at work
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    fitted = [line.partition(": fitted")[0] for line in said.splitlines() if ": fitted" in line]
    assert sorted(fitted) == sorted(map(str, cells_of(suite)))  # each once
    assert not [*out.rglob("work-*"), *out.rglob(".*.tmp")]

    run_suite(suite, tmp_path / "alone", jobs=1)
    write_tables(suite, tmp_path / "alone")
    assert bytes_of(out) == bytes_of(tmp_path / "alone")
    anchors = [tmp_path / name / "anchors/made/1/anchors.safetensors" for name in ("out", "alone")]
    assert anchors[0].read_bytes() == anchors[1].read_bytes()
