"""What the processor can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loracurve.system.processor import multiplies_bfloat16


@pytest.mark.parametrize(
    ("known", "expected"),
    [({"avx2": True, "amx_bf16": False, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True), ({}, False)],
)
def test_bfloat16_needs_instructions(known: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert multiplies_bfloat16() is expected


def test_a_torch_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert multiplies_bfloat16() is False
