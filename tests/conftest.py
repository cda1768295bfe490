"""Settings of the whole test run, made before any library reads them."""

from __future__ import annotations

import os
from pathlib import Path

# Tests never fetch anything: what is not installed is skipped.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# The workers of pytest-xdist, and what they start, would fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# A suite refuses code that no commit holds, which code being worked on is: git finds no checkout from the package.
os.environ["GIT_CEILING_DIRECTORIES"] = str(Path(__file__).parents[1] / "src")

import gc
import shutil

import pytest
import torch
from hypothesis import HealthCheck, settings

# Their assertions are explained too where they fail.
pytest.register_assert_rewrite("helpers")
from helpers.made_runs import QUICK, SCAN, SCORED, Maker, base_folder, command, config_file, data_folder  # noqa: E402
from helpers.places import PREPARED  # noqa: E402

torch.set_num_threads(1)

# How long an example takes says something about the machine alone.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")


def pytest_collection_finish() -> None:
    """What is imported stays: collections of garbage, one for each cell of a suite, need not walk all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of prepared data sets beside the checkout; tests that need it are skipped without it."""
    if not PREPARED.is_dir():
        pytest.skip("no prepared data sets beside the checkout")
    return PREPARED


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def scored_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fitted run of each scoring, anchored but for lm, which is free."""
    root, made = tmp_path_factory.mktemp("runs"), {}
    for scoring, architecture in SCORED.items():
        base = base_folder(root / f"base-{scoring}", architecture)
        config = config_file(root / f"{scoring}.yaml", base, data_folder(root / f"data-{scoring}", scoring), scoring)
        kind = "free" if scoring == "lm" else "anchored"
        command("fit", config, "--out", root / scoring, f"--curve.kind={kind}", *QUICK)
        made[scoring] = root / scoring
    return made


@pytest.fixture(scope="session")
def reported(scored_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the multiple-choice run, scanned and reported."""
    run = Path(shutil.copytree(scored_runs["letter"], tmp_path_factory.mktemp("reported") / "letter"))
    command("scan", run, *SCAN, "--hessian", "1")
    command("report", run)
    return run
