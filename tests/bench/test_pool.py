"""Several cells at a time: GPUs, and cells that ran out of memory."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.suites import anchored, breaks_once_used, killed_or_done, little, needs_room, visible_from_the_start

from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.single import Single
from loracurve.bench import pool
from loracurve.bench.cells import Outcome, Result
from loracurve.bench.pool import _processes, spread, visible_gpus
from loracurve.bench.runner import prepare
from loracurve.bench.suite import Cell
from loracurve.system.folders import is_running


@pytest.mark.parametrize("stopped", ["later", "crowded"])
def test_cells_that_could_not_run_beside_others_run_once_more_alone(
    stopped: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = little(tmp_path, methods={"one": Single(), "curve": anchored(), "ensemble 3": Ensemble(3)})
    out, calls, said = tmp_path / "out", [], list[str]()
    out.mkdir()
    cells = prepare(suite, out)

    def spread(cells: list[Cell], jobs: int, submit: Any, end: Any, say: Any, close: Any) -> dict[Cell, Outcome]:
        calls.append((cells, jobs))
        outcomes: list[Outcome] = [stopped, "failed", "broken"] if len(calls) == 1 else ["done"]
        return dict(zip(cells, outcomes, strict=False))

    monkeypatch.setattr(pool, "spread", spread)
    found = pool.run_in_pool(suite, cells, out, 2, None, said.append)
    assert found == dict(zip(cells, ("done", "failed", "broken"), strict=False))
    assert calls == [(cells, 2), (cells[:1], 1)]
    assert said == ["1 cell could not run beside others: once more, one at a time"]


def test_a_killed_process_costs_its_cell_a_try_and_no_other_cell(tmp_path: Path) -> None:
    cells = [*(Cell("made", 0, name) for name in ("first", "always", "one")), Cell("made", 1, "two")]
    said: list[str] = []
    with _processes(["", ""], 1) as (submit, _):
        found = spread(cells, 2, lambda p, cell: submit(p, killed_or_done, cell, str(tmp_path)), None, said.append)
    assert found == dict(zip(cells, ("done", "broken", "done", "done"), strict=True))
    assert sorted(line for line in said if "process is gone" in line) == [
        f"{cells[1]}: its process is gone; given up",
        f"{cells[1]}: its process is gone; once more in a new one",
        f"{cells[0]}: its process is gone; once more in a new one",
    ]


def test_a_cell_without_memory_costs_a_place_and_no_other_cell(tmp_path: Path) -> None:
    """Of three places two find memory. The third's process ends, and its cell runs at one of the others."""
    cells = [Cell("made", seed, name) for seed in (0, 1, 2) for name in ("one", "two")]
    said: list[str] = []
    with _processes([""] * 3, 1) as (submit, close):
        work = partial(needs_room, folder=str(tmp_path), room=2)
        found = spread(cells, 3, lambda p, cell: submit(p, work, cell), None, said.append, close)
        alive = [is_running(int(path.name.split()[1])) for path in tmp_path.glob("process *")]
    assert sorted(alive) == [False, True, True]
    assert found == dict.fromkeys(cells, "done")
    told = [line for line in said if "no memory" in line]
    assert len(told) == 1 and told[0].endswith("once more, with 2 at a time")


def test_a_cell_that_never_finds_memory_costs_one_place() -> None:
    log: list[tuple[int, str]] = []

    def submit(place: int, cell: Cell) -> Future[Result]:
        log.append((place, cell.method))
        done = Future[Result]()
        done.set_result(("crowded" if cell.method == "huge" else "done", []))
        return done

    closed: list[int] = []

    def close(place: int) -> bool:
        closed.append(place)
        return True

    cells = [Cell("made", seed, name) for seed, name in enumerate(["huge", *"abcdef"])]
    found = spread(cells, 3, submit, None, lambda _: None, close)
    assert found == {cell: "crowded" if cell.method == "huge" else "done" for cell in cells}
    assert closed == [0] and [name for _, name in log].count("huge") == 2


def test_the_last_place_of_a_device_stays() -> None:
    with _processes(["0", "0", "1"], 1) as (submit, close):
        submit(0, visible_from_the_start).result()
        assert [close(place) for place in (2, 0, 1)] == [False, True, False]
    cell = Cell("made", 0, "huge")
    found = spread([cell], 1, lambda *_: crowded(), None, lambda _: None, lambda _: False)
    assert found == {cell: "crowded"}


def crowded() -> Future[Result]:
    found = Future[Result]()
    found.set_result(("crowded", []))
    return found


def test_a_process_in_which_a_cell_broke_gets_no_other() -> None:
    cells = [Cell("made", 0, name) for name in "abcd"]
    with _processes([""], 1) as (submit, _):
        found = spread(cells, 1, lambda p, cell: submit(p, breaks_once_used, cell), None, lambda _: None)
    assert found == dict(zip(cells, ("done", "broken", "done", "broken"), strict=True))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")
@pytest.mark.parametrize("before", [None, "5,6"])
def test_a_process_sees_its_gpu_before_any_import(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some packages look for devices when they are imported, and what is hidden later stays in sight."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    with _processes(["6", "5", ""], 1) as (submit, _):
        found = [submit(place, visible_from_the_start) for place in range(3)]
        assert [future.result()[1][0] for future in found] == ["6", "5", before or "none named"]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_a_place_stays_with_what_it_has_loaded() -> None:
    log: list[str] = []

    def submit(place: int, cell: Cell) -> Future[Result]:
        log.append(f"{place}: {cell.seed}{cell.method}")
        done = Future[Result]()
        done.set_result(("done", []))
        return done

    cells = [Cell("made", seed, name) for seed in (0, 1, 2) for name in "abc"]
    assert spread(cells, 2, submit, None, lambda _: None) == dict.fromkeys(cells, "done")
    # Seeds 0 and 1 side by side, each at one place. Then seed 2: its first cell alone, which trains the anchors.
    assert log == ["0: 0a", "1: 1a", "0: 0b", "1: 1b", "0: 0c", "1: 1c", "0: 2a", "0: 2b", "1: 2c"]


def test_the_time_is_up() -> None:
    def submit(place: int, cell: Cell) -> Future[Result]:
        raise AssertionError

    said: list[str] = []
    assert spread([Cell("made", 0, name) for name in "ab"], 1, submit, time.perf_counter() - 1, said.append) == {}
    assert said == ["2 cells left for later, the time is up"]


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
