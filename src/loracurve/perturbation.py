"""Flat-minima perturbation: the loss is taken at noisy weights while training, never at evaluation.

Three kinds. `flat_lora` (Li et al., arXiv 2409.14396) adds Gaussian noise to the merged weight of each adapted map,
`lora_space` adds it to the factors of the point, `sam` (Foret et al. 2021) steps up the gradient first. A step has one
standard normal draw for each map, shared by its rows, tokens, micro-batches and curve points; only the scale depends on
t. So points do not disagree because of the noise, and a diversity term is not paid for it.

Strengths are tensors and seeds are generator state, both set between steps (`Perturbation.start`), so that a whole step
can be captured in a CUDA graph (register `Perturbation.generators` with it after a warm-up step).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loracurve.errors import UserError, nearest
from loracurve.layers import CurveLayer, CurveLinear
from loracurve.sharpness_aware import sam_ascent, sam_backward, shifted
from loracurve.weight_noise import Draws, flat_lora, perturb_factors, squared_row_norms

__all__ = [
    "Draws",
    "FlatLora",
    "LoraSpace",
    "MapNoise",
    "Perturbation",
    "PerturbationConfig",
    "flat_lora",
    "needs_shared_points",
    "needs_single_point",
    "perturb_factors",
    "sam_ascent",
    "sam_backward",
    "shifted",
    "squared_row_norms",
    "strength",
]

KINDS = ("none", "flat_lora", "lora_space", "sam")
SCHEDULES = ("constant", "ramp", "cyclic")


@dataclass(frozen=True)
class PerturbationConfig:
    """Noise on the weights while training, to find flat minima."""

    kind: Literal["none", "flat_lora", "lora_space", "sam"] = "none"
    """flat_lora: noise on the merged weight of each adapted map, costs two more products with a weight-sized matrix.
    lora_space: noise on the factors A and B, cheap, for quantised bases too. sam: ascent step first, costs two passes,
    needs points 1."""
    rho: float = 0.05
    """Strength. flat_lora and lora_space: noise relative to the size of a row (the authors take 0.05 for constant and
    ramp, 0.25 for cyclic). sam: length of the ascent step in the norm of all factors together."""
    schedule: Literal["constant", "ramp", "cyclic"] = "constant"
    """constant: rho. ramp: linearly up to rho at the last step. cyclic: rho (1 - cos), mean rho and peak 2 rho."""
    cycles: int = 50
    """Cycles in the run (cyclic)."""
    norm_gradient: bool = False
    """Let gradients flow through the row norms that scale the noise of flat_lora."""

    def __post_init__(self) -> None:
        for name, valid in (("kind", KINDS), ("schedule", SCHEDULES)):
            found = getattr(self, name)
            if found not in valid:
                raise UserError(
                    f"perturbation.{name}: expected one of {', '.join(valid)}, found {found!r}{nearest(found, valid)}"
                )
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise UserError(f"perturbation.rho: expected a number of at least 0, found {self.rho}; try 0.05")
        if self.cycles < 1:
            raise UserError(f"perturbation.cycles: expected at least 1, found {self.cycles}; try 50")


def strength(config: PerturbationConfig, step: int, steps: int) -> float:
    """The strength of a step (0-based) of a run of `steps`, in units of `rho`'s kind.

    Raises:
        UserError: more cycles than half the steps, which the steps could not follow.
    """
    if config.schedule == "constant" or config.kind == "none":
        return config.rho
    if config.schedule == "ramp":
        return config.rho * (step + 1) / steps
    if steps < 2 * config.cycles:
        raise UserError(
            f"perturbation.cycles: {config.cycles} cycles need at least {2 * config.cycles} steps, found {steps}; "
            f"lower cycles to {max(steps // 6, 1)}"
        )
    return config.rho * (1 - math.cos(2 * math.pi * config.cycles * step / steps))


def needs_shared_points(config: PerturbationConfig) -> bool:
    """Whether all rows of a micro-batch must lie at the same curve points (the route *points*)."""
    return config.kind != "none"


def needs_single_point(config: PerturbationConfig) -> bool:
    """Whether a micro-batch must lie at one t: `sam`, whose ascent step belongs to one theta(t)."""
    return config.kind == "sam"


class MapNoise:
    """What perturbs one map while training; leaves everything as it is unless a kind overrides it.

    Args:
        draws: the map's random draws.
        rho: 0-d, the strength of the step.
    """

    def __init__(self, draws: Draws, rho: Tensor) -> None:
        self.draws, self.rho = draws, rho

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factors a [G, r, n_in] and b [G, r, n_out] of G points, perturbed."""
        return a, b

    def output(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, ids: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """The map's output y [..., n_out] for the input x [..., n_in] (before dropout), perturbed.

        Args:
            a, b: the factors of G points. b holds the chosen outputs only.
            ids: the outputs that y holds; default: all.
            groups: [P] the point of each row of y [P, n_out]; default: rows lie in G equal consecutive groups.
        """
        return y


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
