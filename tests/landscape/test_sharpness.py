"""Noise around points of a path, and the largest curvature of a known loss."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path as FilePath
from types import SimpleNamespace

import pytest
import torch
from helpers.laid_out import setting
from torch import Tensor

from loracurve.landscape.paths import curve_path
from loracurve.landscape.scan import LaidOut
from loracurve.landscape.sharpness import balanced_adapter, hessian_top_eigenvalue, perturbed, sharpness_along


def test_noise_and_hessian(tmp_path: FilePath) -> None:
    model, split = setting(tmp_path)
    path = curve_path(model)
    frame = sharpness_along(model, path, split, [0.2, 0.7], sigma=0.0, draws=1)
    assert frame["increase"].abs().max() < 1e-6
    noisy = sharpness_along(model, path, split, [0.2], sigma=0.5, draws=2)
    assert noisy["increase"].abs().max() > 1e-4
    adapter = balanced_adapter(model.adapter(0.2))
    moved = perturbed(adapter, 0.1, seed=0)
    for name, tensor in adapter.items():
        along = 1 if "lora_A" in name else 0
        step = (moved[name] - tensor).square().mean(along).sqrt() / tensor.square().mean(along).sqrt()
        assert float(step.min()) > 0.03 and float(step.max()) < 0.25, name
    # The Rayleigh quotient of the Hessian against differences of gradients along the same direction.
    top = hessian_top_eigenvalue(model, adapter, split, iterations=15)
    again = hessian_top_eigenvalue(model, adapter, split, iterations=40)
    assert abs(again) > 1e-3 and abs(top - again) < 0.25 * abs(again)
    assert torch.is_grad_enabled() and model.runner.route.kind == "base"


def test_hessian_of_a_quadratic_is_known() -> None:
    """Power iteration on a stand-in whose Hessian is diag(1, 5): the loss sum_i h_i a_i^2 / 2."""

    class Stub(torch.nn.Module):
        layers: dict[str, object] = {}

        def __init__(self) -> None:
            super().__init__()
            self.a: Tensor | None = None

    stub, adapter = Stub(), {"lora_A.weight": torch.tensor([[0.3, -0.2]], dtype=torch.float64)}
    batch = type("B", (), {"labels": torch.tensor([0])})()

    class Encoded(list):  # type: ignore[type-arg]
        scoring, predictions = "answer", 1

    split = LaidOut("train", Encoded([None]), [batch], torch.tensor([0]))  # type: ignore[arg-type]

    @contextmanager
    def fold(tensors: dict[str, Tensor]):  # type: ignore[no-untyped-def]
        stub.a = tensors["lora_A.weight"]
        yield

    def scores(batch: object, coefficients: object) -> Tensor:
        assert stub.a is not None
        loss = (torch.tensor([1.0, 5.0], dtype=torch.float64) * stub.a.square()).sum() / 2
        # Two classes whose first has log-probability -loss.
        return torch.stack([-loss, torch.log1p(-(-loss).exp())])[None, None]

    stub.runner = SimpleNamespace(scores=scores)  # type: ignore[assignment]
    stub.merger = SimpleNamespace(adapter=fold)  # type: ignore[assignment]
    found = hessian_top_eigenvalue(stub, adapter, split, iterations=60)  # type: ignore[arg-type]
    assert found == pytest.approx(5.0, rel=1e-6)
