"""Settings of the whole test run, made before any library reads them."""

from __future__ import annotations

import os
from pathlib import Path

# Tests never fetch anything: what is not installed is skipped.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# The workers of pytest-xdist, and what they start, would fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# Bounds of tests are those of the CPU. The GPU has tests of its own, and some of these hold there, too.
if os.environ.get("TEST_ON_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A suite refuses code that no commit holds, which code being worked on is: git finds no checkout from the package.
os.environ["GIT_CEILING_DIRECTORIES"] = str(Path(__file__).parents[1] / "src")

import gc
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

# Their assertions are explained too where they fail.
pytest.register_assert_rewrite("helpers")
from helpers.made_runs import QUICK, SCAN, SCORED, Maker, base_folder, command, config_file, data_folder  # noqa: E402
from helpers.places import PREPARED  # noqa: E402

torch.set_num_threads(1)


def _written_is_enough(file: Any) -> None:
    """In place of `os.fsync`, which waits for the disk: what a killed process wrote is there without it."""
    os.fstat(file if isinstance(file, int) else file.fileno())


os.fsync = _written_is_enough

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


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills for the first worker that asks; each gets a copy of its own."""
    own = factory.mktemp("copies") / name
    workers = "PYTEST_XDIST_WORKER" in os.environ
    shared = (factory.getbasetemp().parent if workers else factory.mktemp("made")) / name
    done = shared.with_name(f"{name}.done")
    with FileLock(shared.with_name(f"{name}.lock")):
        if not done.exists():
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir()
            make(shared)
            done.touch()
    return Path(shutil.copytree(shared, own))


@pytest.fixture(scope="session")
def scored_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fitted run of each scoring, anchored but for lm, which is free."""

    def make(root: Path) -> None:
        for scoring, architecture in SCORED.items():
            base = base_folder(root / f"base-{scoring}", architecture)
            config = config_file(
                root / f"{scoring}.yaml", base, data_folder(root / f"data-{scoring}", scoring), scoring
            )
            kind = "free" if scoring == "lm" else "anchored"
            command("fit", config, "--out", root / scoring, f"--curve.kind={kind}", *QUICK)

    root = made_once(tmp_path_factory, "scored_runs", make)
    return {scoring: root / scoring for scoring in SCORED}


@pytest.fixture(scope="session")
def reported(scored_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the multiple-choice run, scanned and reported."""

    def make(root: Path) -> None:
        run = shutil.copytree(scored_runs["letter"], root / "letter")
        command("scan", run, *SCAN, "--hessian", "1")
        command("report", run)

    return made_once(tmp_path_factory, "reported", make) / "letter"
