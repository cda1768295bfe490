"""Settings of the whole test run, made before any library reads them."""

from __future__ import annotations

import os

# Tests never fetch anything: what is not installed is skipped.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the workers of pytest-xdist would fight over the cores


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of prepared data sets beside the checkout; tests that need it are skipped without it."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no prepared data sets beside the checkout")
    return folder
