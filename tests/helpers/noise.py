"""Layers, models and seeded draws for tests of noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from helpers.tiny import lora_config, random_points, tiny
from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.model.layers import CurveLinear
from loracurve.model.routes import Route
from loracurve.model.weight_noise import Draws, flat_lora

CPU = torch.device("cpu")
DOUBLE = torch.float64


def seeded(stream: str = "map", seed: int = 0, step: int = 0) -> Draws:
    draws = Draws(stream, CPU)
    draws.reseed(seed, step)
    return draws


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def epsilon(scale: Tensor, n_in: int, draws: Draws) -> Tensor:
    """The noise of one point [n_out, n_in], read off with the identity as input."""
    x = torch.eye(n_in, dtype=scale.dtype)
    return flat_lora(x.new_zeros(n_in, len(scale)), x, scale[None], draws).mT


def layer(kind: type[nn.Module] = nn.Linear, n_in: int = 24, n_out: int = 10, points: int = 3) -> CurveLinear:
    base = (nn.Linear(n_in, n_out) if kind is nn.Linear else Conv1D(n_out, n_in)).double()
    nn.init.normal_(base.weight, generator=torch.Generator().manual_seed(3))
    made = CurveLinear(base, Route(), 4, 0.5, 0.0, n_in, n_out)
    made.set_factors(
        {"lora_A.weight": randn(points, 4, n_in, seed=1), "lora_B.weight": randn(points, n_out, 4, seed=2)}
    )
    return made


def noisy_model(architecture: str = "llama", **options: object) -> CurveModel:
    model = CurveModel(tiny(architecture, DOUBLE), lora_config(architecture, **options), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    return model


def ids(rows: int = 3) -> Tensor:
    return torch.randint(3, 300, (rows, 7), generator=torch.Generator().manual_seed(2))


def loss_at(model: CurveModel, t: float | Tensor) -> Callable[[], tuple[Tensor, None]]:
    return lambda: (model(t, input_ids=ids()).logits.log_softmax(-1)[..., 5].mean().neg(), None)


def digest(model: CurveModel) -> str:
    state = sorted(model.model.state_dict().items())
    return hashlib.sha256(b"".join(v.contiguous().numpy().tobytes() for _, v in state)).hexdigest()
