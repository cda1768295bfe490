"""Rows at points of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.matrix import build
from helpers.tiny import random_points
from torch.nn.functional import cross_entropy

from loracurve.curve.sampling import sample_points
from loracurve.curve.spec import CurveSpec
from loracurve.tasks.batching import collate


def test_rows_with_their_own_points_have_the_gradient_of_single_points(tmp_path: Path) -> None:
    model, _, task = build("llama", tmp_path, CurveSpec(2, 2), torch.float64)
    model.set_curve(model.spec, random_points(model))
    batch = collate(task.encode("train"), range(6), row_tokens=1)
    assert len(batch.input_ids) == 6
    t = sample_points((1, 6), "stratified", torch.Generator().manual_seed(0))

    def gradients(run) -> list[torch.Tensor]:
        for p in model.factors:
            p.grad = None
        run().backward()
        return [p.grad.clone() for p in model.factors]

    def all_at_once() -> torch.Tensor:
        return cross_entropy(model.runner.scores(batch, model.coefficients(t))[0], batch.labels)

    def one_by_one() -> torch.Tensor:
        losses = []
        for i in range(6):
            single = collate(task.encode("train"), [i])
            scores = model.runner.scores(single, model.coefficients(t[0, i : i + 1]))[0]
            losses.append(cross_entropy(scores, single.labels))
        return torch.stack(losses).mean()

    together = gradients(all_at_once)
    assert model.runner.route.windows == 2, "rows are grouped by segment"
    for a, b in zip(together, gradients(one_by_one), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@torch.no_grad()
def test_held_factors_are_those_that_are_made_anew(tmp_path: Path) -> None:
    """To the last bit, at the points that are held and at others, and after the control points have changed."""
    model, _, task = build("llama", tmp_path, CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    batch = collate(task.encode("train"), range(6))
    t = torch.linspace(0, 1, 5, dtype=torch.float64)

    def predicted() -> list[torch.Tensor]:
        return [model.point_log_probs(batch, points) for points in (t, t, t[:3])]

    held = None
    for change in (1.0, 1.5):
        for factor in model.factors:
            factor.mul_(change)
        model.runner._held = None
        expected = predicted()
        if change == 1.0:
            model.runner.hold(t)
        else:
            model.runner._held = held
        found = predicted()
        held = model.runner._held
        assert held is not None and len(held[1]) == len(model.factors)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    model.set_curve(model.spec, model.control_points())
    assert model.runner._held is None
