"""Bootstrap along the curve: random weights of the examples that are Exp(1) at every t and smooth in t.

With independent Exp(1) weights on the examples, a maximiser of the weighted likelihood is one draw of the
weighted-likelihood bootstrap (Newton & Raftery 1994), whose spread is to first order the sandwich covariance
(Lyddon, Holmes & Walker 2019). Here the weights of example n are a process along the curve,

    w_n(t) = (z_1(t)^2 + z_2(t)^2) / 2,    cov(z_c(t), z_c(t')) = k(t - t') = exp(-(t - t')^2 / (2 l^2)),

with independent Gaussian processes z_1, z_2, so that w_n(t) ~ Exp(1) at every t and corr(w_n(t), w_n(t')) = k^2. Each
point of the curve then maximises a bootstrap likelihood of its own, and these change continuously along it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loracurve.errors import UserError
from loracurve.randomness import stream_seed

__all__ = ["BootstrapConfig", "BootstrapWeights"]

# splitmix64 (Steele, Lea & Flood 2014, figure 17), as signed numbers: torch has no shift of unsigned ones.
_GOLDEN, _FIRST, _SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class BootstrapConfig:
    """Random weights of the examples that change along the curve."""

    kind: Literal["none", "everywhere", "tied"] = "none"
    """everywhere: each point of the curve has weights of its own, and anchors are trained with those at their t. tied:
    every weight is 1 at the anchors, which are trained as usual. Costs nothing that shows beside a step."""
    length_scale: float = 0.25
    """How far along the curve weights stay similar, in units of t (the whole curve is 1)."""
    features: int = 64
    """Waves that make up each random process."""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "everywhere", "tied"):
            raise UserError(f"bootstrap.kind: expected none, everywhere or tied, found {self.kind!r}; choose one")
        BootstrapWeights(0, self.length_scale, self.features)

    def weights(self, seed: int, anchors: Sequence[float]) -> BootstrapWeights | None:
        """The weights of a run with anchors at these t; None without a bootstrap."""
        if self.kind == "none":
            return None
        tied = tuple(anchors) if self.kind == "tied" else ()
        return BootstrapWeights(seed, self.length_scale, self.features, tied)


@dataclass(frozen=True)
class BootstrapWeights:
    """Weights w_n(t) as a pure function of (seed, example number, t); nothing is stored for the data set.

    A process is a sum of waves, z(t) = R^{-1/2} sum_r rho_r cos(omega_r t - phi_r), rho_r Rayleigh and phi_r uniform:
    exactly Gaussian of variance 1 for any R. The amplitudes are hashes of (seed, example, r); a table would cost 4 R
    numbers for each example of the data set. The frequencies omega_r are the normal distribution's quantiles divided
    by l, which approximates the squared-exponential kernel better than random ones (Rahimi & Recht 2007; quasi-Monte
    Carlo features: Yang et al. 2014).

    With `tied_at`, w is 1 at these t, where an anchor was trained with every weight 1: 1 + s(t) (w(t) - 1) with s
    smooth, 0 at the anchors and 1 from one length scale away on. This stays positive and of mean 1; its variance is
    s(t)^2. (Conditioning the processes on |z|^2 = 2 at several anchors would not keep the mean.)
    """

    seed: int
    """Seed of all examples' weights."""
    length_scale: float
    """l, in units of t: how far along the curve the weights stay similar."""
    features: int = 64
    """R, waves in each process."""
    tied_at: tuple[float, ...] = ()
    """t at which every weight is exactly 1."""

    def __post_init__(self) -> None:
        if not 0 < self.length_scale < math.inf:
            raise UserError(
                f"bootstrap.length_scale: expected a number > 0 in units of t, found {self.length_scale}; try 0.25"
            )
        if self.features < 1:
            raise UserError(f"bootstrap.features: expected at least 1, found {self.features}; try 64")
        if not all(0 <= t <= 1 for t in self.tied_at):
            raise UserError(f"bootstrap.tied_at: expected t in [0, 1], found {self.tied_at}")

    def weights(self, numbers: Tensor, t: Tensor) -> Tensor:
        """w_n(t) for E examples at n points of the curve.

        Args:
            numbers: long ``[E]``, what identifies an example for good: its number in the data set. Examples that are
                not exchangeable on their own (tokens of one text) share a number.
            t: ``[n]``, or ``[n, E]`` where each example has its own points; floating point.

        Returns:
            ``[n, E]`` in t's dtype, positive, of mean 1 over examples at every t; on t's device.
        """
        at = t.double()
        angles = at.unsqueeze(-1) * self._frequencies(at)
        # rho cos(a - phi) = rho cos(phi) cos(a) + rho sin(phi) sin(a): all pairs (t, example) are one product.
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        radius, phase = self._amplitudes(numbers.to(at.device))
        parts = torch.cat([radius * phase.cos(), radius * phase.sin()], -1) / math.sqrt(self.features)
        processes = torch.einsum("nr,erc->nec" if t.dim() == 1 else "ner,erc->nec", waves, parts.transpose(1, 2))
        w = processes.square().sum(-1) / 2
        return (1 + self._tie(at).view(len(at), -1) * (w - 1)).to(t.dtype)

    def _frequencies(self, like: Tensor) -> Tensor:
        """``[R]`` quantiles of |N(0, 1)| over l: a wave and its mirror image are the same one."""
        middles = (torch.arange(self.features, dtype=torch.float64, device=like.device) + 0.5) / self.features
        return torch.special.ndtri((1 + middles) / 2) / self.length_scale

    def _amplitudes(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """rho and phi, ``[E, 2, R]`` float64 each."""
        counter = torch.arange(1, 4 * self.features + 1, device=numbers.device)
        streams = _splitmix(stream_seed(self.seed, "bootstrap") + numbers * _GOLDEN)
        bits = _splitmix(streams.unsqueeze(-1) + counter * _GOLDEN)
        uniform = ((bits >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53
        radius, phase = uniform.view(-1, 2, 2, self.features).unbind(1)
        return (-2 * radius.log()).sqrt(), 2 * math.pi * phase

    def _tie(self, t: Tensor) -> Tensor:
        """s(t): product over anchors of 10 x^3 - 15 x^4 + 6 x^5 in the distance x, in length scales and at most 1."""
        s = torch.ones_like(t)
        for anchor in self.tied_at:
            x = ((t - anchor).abs() / self.length_scale).clamp(max=1)
            s = s * x**3 * (10 - 15 * x + 6 * x**2)
        return s


def _splitmix(state: Tensor) -> Tensor:
    """The output function of splitmix64 on long tensors, whose products wrap around."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * factor
    return state ^ (state >> 31 & (1 << 33) - 1)
