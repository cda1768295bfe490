"""Capture that fails, and what lies about while it goes on."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from loracurve.model.cuda_graphs import WARM_UP, Captured, _no_garbage


def test_nothing_that_nobody_holds_is_destroyed_during_a_capture() -> None:
    class Held:
        pass

    def dropped() -> weakref.ref[Held]:
        one = Held()
        one.itself = one  # type: ignore[attr-defined]
        return weakref.ref(one)

    before = dropped()
    with _no_garbage():
        assert before() is None and not gc.isenabled()
        during = dropped()
        made = [[[]] for _ in range(100_000)]  # more than a collection waits for
        assert during() is not None and made
    assert gc.isenabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_after_a_capture_that_failed_generators_draw_on() -> None:
    own = torch.Generator("cuda")

    def function(x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(x.shape, device="cuda", generator=own)
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()  # looks at a value, which no captured function may
        return torch.dropout(x, 0.5, True) + noise

    captured = Captured(function, torch.device("cuda"), generators=lambda: [own])
    draws = [captured(torch.ones(100)) for _ in range(WARM_UP + 2)]
    assert not captured.enabled
    draws.append(torch.rand(100, device="cuda", generator=own))
    draws.append(torch.rand(100, device="cuda"))
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)
