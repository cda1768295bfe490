"""A tokenizer of each style."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.texts import STYLES


@pytest.fixture(params=STYLES, ids=str)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return STYLES[request.param]()
