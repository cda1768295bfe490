"""Gaussian noise on weights whose draw is made again instead of being kept.

Pure functions of factors, weights and a generator; `training.perturbation` decides where and when they act.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loracurve.system.randomness import stream_seed

__all__ = ["Draws", "MapNoise", "flat_lora", "perturb_factors", "squared_row_norms"]


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


# Entries of the noise that exist at one time: 32 MiB in bfloat16, less than what 4,096 tokens take inside an MLP.
NOISE_CHUNK = 2**24

# Blocks are whole tiles of a matrix product: odd sizes run up to 3 times slower on GPUs.
TILE = 256


class Draws:
    """The random draw of one map: every use in a step (forward, recomputation, backward) sees the same numbers.

    Each use has its own generator at the start of the same stream, because a generator cannot be rewound inside a CUDA
    graph. `reseed` comes before each step.

    Args:
        stream: the name of the stream: draws of different names, seeds or steps are independent.
        device: where the noise is drawn.
    """

    def __init__(self, stream: str, device: torch.device) -> None:
        self.stream, self.device = stream, device
        self.generators: list[torch.Generator] = []
        self._value, self._used = 0, 0

    def reseed(self, seed: int, step: int) -> None:
        """Go to the start of the step's stream."""
        self._value, self._used = stream_seed(seed, "perturbation", self.stream, step), 0
        for generator in self.generators:
            generator.manual_seed(self._value)

    def next(self) -> torch.Generator:
        """A generator at the start of the stream, for one use."""
        if self._used == len(self.generators):
            self.generators.append(torch.Generator(self.device).manual_seed(self._value))
        self._used += 1
        return self.generators[self._used - 1]


def _standard_normal(n_out: int, like: Tensor, draws: Draws) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of a standard normal [n_out, n_in], each valid until the next is drawn."""
    n_in, generator = like.shape[-1], draws.next()
    block = NOISE_CHUNK // n_in
    block = min(block - block % TILE if block > TILE else max(block, 1), n_out)
    buffer = like.new_empty(block, n_in)
    for start in range(0, n_out, block):
        rows = slice(start, min(start + block, n_out))
        yield rows, buffer[: rows.stop - start].normal_(generator=generator)


class _NoiseProduct(torch.autograd.Function):
    """x [P, n_in] -> x Z^T [P, n_out] with Z standard normal, drawn again for the backward pass; nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n_out: int, draws: Draws) -> Tensor:
        ctx.n_in, ctx.n_out, ctx.draws = x.shape[1], n_out, draws
        y = x.new_empty(len(x), n_out)
        for rows, z in _standard_normal(n_out, x, draws):
            torch.mm(x, z.mT, out=y[:, rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x_like = grad.new_empty(0, ctx.n_in)
        total: Tensor | None = None
        for rows, z in _standard_normal(ctx.n_out, x_like, ctx.draws):
            part = grad[:, rows] @ z
            # Many blocks are summed in at least float32: rounding to bfloat16 each time would add up.
            total = part.to(torch.promote_types(part.dtype, torch.float32)) if total is None else total.add_(part)
        assert total is not None
        return total.to(grad.dtype), None, None


def flat_lora(y: Tensor, x: Tensor, scale: Tensor, draws: Draws) -> Tensor:
    """y + x eps^T with eps_ij = scale_i z_ij, z standard normal (Flat-LoRA, Li et al., arXiv 2409.14396).

    Neither eps nor z is kept for the backward pass, which draws z again; gradients reach y, x and scale.

    Args:
        y: [..., n_out] output of the map. x: [..., n_in] its input.
        scale: [G, n_out], the flattened leading dimensions of y lie in G equal consecutive groups.
        draws: of this map.
    """
    n_out = y.shape[-1]
    noise = _NoiseProduct.apply(x.reshape(-1, x.shape[-1]), n_out, draws)
    group = (len(scale), -1, n_out)
    return torch.addcmul(y.reshape(group), noise.view(group).to(y.dtype), scale[:, None].to(y.dtype)).view(y.shape)


def squared_row_norms(weight: Tensor, base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """||W'_i||^2 of W' = W0 + s B A without forming W': [G, n_out] for G points.

    ||W0_i||^2 + 2 s (W0 A^T B^T)_ii + s^2 (B A A^T B^T)_ii

    Args:
        weight: W0 [n_out, n_in]. base: its squared row norms [n_out].
        a: [G, r, n_in]. b: B transposed, [G, r, n_out], as `CurveLinear` keeps it. scaling: s.
    """
    product = nn.functional.linear(a.flatten(0, 1).to(weight.dtype), weight).view(b.shape).to(base.dtype)
    a, b = a.to(base.dtype), b.to(base.dtype)
    cross, square = (product * b).sum(1), ((a @ a.mT @ b) * b).sum(1)
    # A positive floor, because the square root follows and its slope at 0 is infinite.
    return (base + 2 * scaling * cross + scaling**2 * square).clamp_min(1e-30)


def perturb_factors(a: Tensor, b: Tensor, rho: Tensor | float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaussian noise on the factors of curve points, relative to their size in the balanced gauge.

    In the balanced gauge (`gauge.balanced`) A = S^1/2 V^T and B = U S^1/2, and the noise is A_ij + rho rms_j(A_ij) z_ij
    and B_ij + rho rms_i(B_ij) z_ij. Brought back into the gauge that the factors are in, its covariance over r is
    rho^2 A A^T / n_in and rho^2 B^T B / n_out. This is how it is drawn, without a singular value decomposition:

        dA = rho / sqrt(n_in) L_A Z,  L_A L_A^T = A A^T;    dB^T = rho / sqrt(n_out) L_B Z,  L_B L_B^T = B^T B

    So the noise of B A has one distribution in every gauge; with D = B A its variance at ij is
    rho^2 (||D_i:||^2 / n_in + ||D_:j||^2 / n_out) + rho^4 ||D||_F^2 / (n_in n_out).

    Args:
        a: [..., r, n_in]. b: B transposed, [..., r, n_out]. Leading dimensions are points; they share Z.
        rho: relative strength, 0-d or a number.
        generator: on the factors' device.

    Returns:
        New factors; no gradient flows through the noise's scale.
    """

    def perturb(factor: Tensor) -> Tensor:
        with torch.no_grad():
            f = factor.double()
            gram = f @ f.mT
            # Relative to each diagonal entry, so that it does not depend on the gauge's units; the floor is for B = 0.
            gram = gram + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) * 1e-12 + 1e-60)
            root = torch.linalg.cholesky_ex(gram)[0].to(factor.dtype)
            z = torch.empty(factor.shape[-2:], dtype=factor.dtype, device=factor.device).normal_(generator=generator)
            noise = root @ z * (rho / math.sqrt(factor.shape[-1]))
        return factor + noise

    return perturb(a), perturb(b)
