"""Several cells at a time: GPUs, and cells that ran out of memory."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.suites import anchored, killed_or_done, little

from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.single import Single
from loracurve.bench import pool
from loracurve.bench.pool import Spread, run_in_pool, spread, visible_gpus
from loracurve.bench.runner import prepare
from loracurve.bench.suite import Cell


def test_cells_that_could_not_run_beside_others_run_once_more_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = little(tmp_path, methods={"one": Single(), "curve": anchored(), "ensemble 3": Ensemble(3)})
    out, calls, said = tmp_path / "out", [], list[str]()
    out.mkdir()
    cells = prepare(suite, out)

    def spread(cells: list[Cell], jobs: int, submit: Any, end: Any, say: Any) -> Spread:
        calls.append((cells, jobs))
        outcomes = ("later", "failed", "broken") if len(calls) == 1 else ("done",)
        return Spread(dict(zip(cells, outcomes, strict=False)))  # type: ignore[arg-type]

    monkeypatch.setattr(pool, "spread", spread)
    found = pool.run_in_pool(suite, cells, out, 2, None, said.append)
    assert found == dict(zip(cells, ("done", "failed", "broken"), strict=False))
    assert calls == [(cells, 2), (cells[:1], 1)]
    assert said == ["1 cell could not run beside others: once more, one at a time"]


def test_a_killed_process_costs_its_cell_a_try_and_no_other_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["first", "always", "one", "two", "three"]
    cells = [Cell("made", seed, name) for seed in (0, 1) for name in names]
    tried: list[int] = []

    def in_pool(suite: Any, cells: list[Cell], out: Path, jobs: int, end: Any, say: Any) -> Spread:
        tried.append(len(cells))
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as workers:  # where nothing is imported
            return spread(cells, jobs, lambda cell: workers.submit(killed_or_done, cell, str(tmp_path)), end, say)

    monkeypatch.setattr(pool, "_in_one_pool", in_pool)
    found = run_in_pool(None, cells, tmp_path, 1, None, lambda _: None)  # type: ignore[arg-type]
    assert found == {cell: "broken" if cell.method == "always" else "done" for cell in cells}
    assert tried == sorted(tried, reverse=True), "every pool has fewer cells left"


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
