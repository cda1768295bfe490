"""Several cells at a time: GPUs, and cells that ran out of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.suites import anchored, little

from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.single import Single
from loracurve.bench import pool
from loracurve.bench.memory import NO_MEMORY
from loracurve.bench.pool import visible_gpus
from loracurve.bench.provenance import options_of
from loracurve.bench.runner import prepare
from loracurve.bench.suite import Cell
from loracurve.system.files import write_json


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
