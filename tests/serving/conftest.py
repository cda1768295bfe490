"""A run that is served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.made_runs import QUICK, base_folder, command, config_file, data_folder
from helpers.served import LIMITS, ROWS

from loracurve.runs.run import Run, open_run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted and calibrated run of classification by a causal model."""
    root = tmp_path_factory.mktemp("server")
    base, data = base_folder(root / "base", "qwen2"), data_folder(root / "data", "label")
    command(
        "fit", config_file(root / "c.yaml", base, data, "label"), "--out", root / "run", "--curve.kind=free", *QUICK
    )
    command("calibrate", root / "run", "--risk=.9")
    return root / "run"


@pytest.fixture(scope="session")
def run(folder: Path) -> Run:
    return open_run(folder)


@pytest.fixture(scope="session")
def client(run: Run) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    from loracurve.serving.app import make_app

    with TestClient(make_app(run, LIMITS), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="session")
def predicted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `loracurve predict` says of ROWS."""
    written = tmp_path_factory.mktemp("predicted")
    (written / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    command("predict", folder, written / "rows.jsonl", "--out", written / "o.jsonl")
    return [json.loads(line) for line in (written / "o.jsonl").read_text().splitlines()]
