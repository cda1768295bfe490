"""Rows at points of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.matrix import build
from helpers.tiny import random_points
from torch.nn.functional import cross_entropy

from loracurve.curve.sampling import sample_points
from loracurve.curve.spec import CurveSpec


def test_rows_with_their_own_points_have_the_gradient_of_single_points(tmp_path: Path) -> None:
    model, _, task = build("llama", tmp_path, CurveSpec(2, 2), torch.float64)
    model.set_curve(model.spec, random_points(model))
    from loracurve.tasks.batching import collate

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
