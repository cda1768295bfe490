"""Flat-minima perturbation: the loss is taken at noisy weights while training, never at evaluation.

Three kinds. `flat_lora` (Li et al., arXiv 2409.14396) adds Gaussian noise to the merged weight of each adapted map,
`lora_space` adds it to the factors of the point, `sam` (Foret et al. 2021) steps up the gradient first. A step has one
standard normal draw for each map, shared by its rows, tokens, micro-batches and curve points; only the scale depends on
t. So points do not disagree because of the noise, and a diversity term is not paid for it.

Strengths are tensors and seeds are generator state, both set between steps (`Perturbation.start`), so that a whole step
can be captured in a CUDA graph (register `Perturbation.generators` with it after a warm-up step).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loracurve.model.layers import CurveLayer, CurveLinear
from loracurve.model.weight_noise import Draws, MapNoise, flat_lora, perturb_factors, squared_row_norms
from loracurve.system.errors import UserError
from loracurve.training.config import PerturbationConfig, strength

__all__ = ["FlatLora", "LoraSpace", "Perturbation"]


class LoraSpace(MapNoise):
    """Noise on the factors (`perturb_factors`); needs no base weight, so any base will do."""

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return perturb_factors(a, b, self.rho, self.draws.next())


class FlatLora(MapNoise):
    """Noise on the merged weight: eps_ij ~ N(0, rho^2 / n_in ||W'_i(t)||^2) (Li et al., arXiv 2409.14396).

    Args:
        layer: its base weight is read and never changed; its row norms are computed once, here.
        norm_gradient: let gradients flow through the norm.

    Raises:
        UserError: the base weight is quantised.
    """

    def __init__(self, layer: CurveLinear, draws: Draws, rho: Tensor, norm_gradient: bool = False) -> None:
        super().__init__(draws, rho)
        weight = getattr(layer.base_layer, "weight", None)
        # Packed 4-bit weights may claim a floating dtype, but not the map's shape.
        shape = {layer.in_features, layer.out_features}
        if weight is None or not weight.is_floating_point() or weight.dim() != 2 or set(weight.shape) != shape:
            raise UserError(
                f"perturbation.kind flat_lora needs floating-point base weights, found {draws.stream} quantised; "
                "use kind lora_space or load the base without quantisation"
            )
        self.weight: Tensor = (weight.mT if layer.transposed else weight).detach()
        self.scaling, self.norm_gradient = layer.scaling, norm_gradient
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.base = torch.linalg.vector_norm(self.weight, dim=1, dtype=dtype).square()
        """[n_out] squared row norms of W0"""

    def output(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, ids: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        with torch.set_grad_enabled(self.norm_gradient and torch.is_grad_enabled()):
            weight, base = (self.weight, self.base) if ids is None else (self.weight[ids], self.base[ids])
            squares = squared_row_norms(weight, base, a, b, self.scaling)
            scale = (squares / self.weight.shape[1]).sqrt() * self.rho
        return flat_lora(y, x, scale if groups is None else scale[groups], self.draws)


class Perturbation:
    """The perturbation of a model during one fit.

    Args:
        config: which one.
        layers: the model's curve layers by name, on the device they train on. Classification heads are left alone by
            flat_lora and lora_space; `sam` moves them too.
        steps: of the run, for the schedule.
        seed: of the draws.

    Raises:
        UserError: a quantised base with flat_lora, a schedule that the steps cannot follow.
    """

    def __init__(self, config: PerturbationConfig, layers: Mapping[str, CurveLayer], steps: int, seed: int) -> None:
        strength(config, 0, steps)
        self.config, self.steps, self.seed = config, steps, seed
        device = next(p.device for layer in layers.values() for p in layer.parameters())
        self.rho = torch.zeros((), device=device)
        """0-d, the strength of the step"""
        self.maps: list[tuple[CurveLinear, MapNoise]] = []
        for name, layer in layers.items():
            if isinstance(layer, CurveLinear) and config.kind in ("flat_lora", "lora_space"):
                draws = Draws(name, device)
                flat = config.kind == "flat_lora"
                noise = FlatLora(layer, draws, self.rho, config.norm_gradient) if flat else LoraSpace(draws, self.rho)
                self.maps.append((layer, noise))

    @property
    def generators(self) -> list[torch.Generator]:
        """All generators in use after a warm-up step, to register with a CUDA graph."""
        return [generator for _, noise in self.maps for generator in noise.draws.generators]

    def start(self, step: int) -> None:
        """Set strength and draws; call it before each step, captured or not."""
        self.rho.fill_(strength(self.config, step, self.steps))
        for _, noise in self.maps:
            noise.draws.reseed(self.seed, step)

    @contextmanager
    def attached(self) -> Iterator[Perturbation]:
        """Give the layers their noise; they use it in training mode only."""
        layers: list[tuple[Any, MapNoise]] = list(self.maps)
        try:
            for layer, noise in layers:
                layer.noise = noise
            yield self
        finally:
            for layer, _ in layers:
                layer.noise = None
