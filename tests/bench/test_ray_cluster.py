"""Suites on a Ray cluster: what each cell takes of it, and a local one of two workers of which one is killed."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from helpers.kills import ended, forked
from helpers.places import ROOT
from helpers.processes import end_group
from helpers.suites import WORK, bytes_of, little

from loracurve.baselines.single import Single
from loracurve.bench.provenance import plain
from loracurve.bench.ray_cluster import shares
from loracurve.bench.runner import run_suite
from loracurve.bench.suite import cells_of
from loracurve.bench.tables.write import write_tables
from loracurve.cli import main
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


def test_no_cluster_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = pytest.importorskip("ray._private.services")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", cache(set))  # others may run one on this machine
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    with pytest.raises(UserError, match="address: expected that of a running Ray cluster, found 'auto'"):
        run_suite(little(tmp_path), tmp_path / "out", executor="ray", address="auto")


KILLS_ITSELF = f"""
import fnmatch, os, pathlib, signal

mark, replace = pathlib.Path(__file__).with_name("killed"), os.replace

def replace_or_die(source, target, **options):
    replace(source, target, **options)
    if fnmatch.fnmatch(str(target), "*anchors/made/1/{WORK}/checkpoint.json") and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace_or_die
"""
"""What Python does when it starts: the first process that has saved a checkpoint of these anchors is killed."""


def test_a_worker_that_is_killed_costs_nothing(tmp_path: Path) -> None:
    """Two workers, each at the anchors of one seed; one is killed amid its training, its cell is run again."""
    pytest.importorskip("ray")
    suite = little(tmp_path, methods={"one": Single()}, seeds=[0, 1])
    suite = replace(suite, training=LoopConfig(steps=4, batch_size=4, learning_rate=1e-2, checkpoint_every=2))
    (tmp_path / "suite.yaml").write_text(json.dumps(plain(suite)))
    (tmp_path / "sitecustomize.py").write_text(KILLS_ITSELF)
    out, told = tmp_path / "out", tmp_path / "told"
    words = ["bench", tmp_path / "suite.yaml", "--out", out, "--executor", "ray", "--jobs", "2"]

    def bench() -> None:
        os.setsid()
        os.environ |= {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}", "RAY_ADDRESS": ""}
        # However long a busy machine takes to start a process.
        os.environ |= dict.fromkeys(["RAY_worker_register_timeout_seconds", "RAY_raylet_start_wait_time_s"], "600")
        sys.exit(main([str(word) for word in words]))

    driver = forked(bench, told)
    try:
        code = ended(driver)
    finally:
        end_group(driver)
    said = told.read_text()
    assert code == 0 and (tmp_path / "killed").exists(), said
    fitted = [line.partition(": fitted")[0] for line in said.splitlines() if ": fitted" in line]
    assert sorted(fitted) == sorted(map(str, cells_of(suite)))  # each once
    assert not [*out.rglob(WORK), *out.rglob(".*.tmp")]

    run_suite(suite, tmp_path / "alone", jobs=1)
    write_tables(suite, tmp_path / "alone")
    assert bytes_of(out) == bytes_of(tmp_path / "alone")
    anchors = [tmp_path / name / "anchors/made/1/anchors.safetensors" for name in ("out", "alone")]
    assert anchors[0].read_bytes() == anchors[1].read_bytes()
