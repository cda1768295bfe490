"""A tube around the curve in the span of its control points, and posterior samples in it.

With e_1(t), ..., e_D(t) an orthonormal frame of the directions normal to theta'(t) within the affine span of the
control points (D one less than the span's dimension, itself at most K - 1),

    theta(t, xi) = theta(t) + sum_j xi_j e_j(t),    t in [0, 1],  xi in R^D

(Dold et al. 2025, arXiv 2503.03382, "Paths and Ambient Spaces in Neural Loss Landscapes"). The frame is rotation
minimising: it turns with the tangent and not around it, so that a fixed xi runs along the curve, off it. It is computed
by the double reflection method (Wang, Juettler, Zheng & Liu 2008, ACM Trans. Graph. 27(1), table I), which works in any
dimension. Control points enter through their Gram matrix only, and what comes out are coefficients: rows c with
theta = sum_k c_k P_k and sum c = 1, which run like those of the curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loracurve.curve.bezier import arc_length, arc_length_parameter, coefficients, derivative_coefficients
from loracurve.system.errors import UserError
from loracurve.system.ranges import Amount, Count, Points, Positive, in_range

__all__ = ["Tunnel", "TunnelSamples", "sample_tunnel"]


# By shrinking, the slice of a deterministic likelihood is found long before.
_MOST_SHRINKS = 200


class Tunnel:
    """The tube, its prior, and its coordinates in which the prior is standard normal.

    The prior is t uniform in [0, 1] or along the arc, xi ~ N(0, sigma^2 I), independent. It is a prior on (t, xi), not
    on theta: no Jacobian enters. At a joint where the curve has a kink, the frame jumps with the tangent.

    Args:
        gram: ``[K, K]`` Gram matrix of the control points (`bezier.gram`).
        segments, degree: shape of the curve.
        sigma: standard deviation of each xi_j, in units of the distance that `gram` measures.
        prior: how t is distributed.
        nodes: steps in each segment by which the frame is carried along; its error falls with their fourth power.

    Raises:
        UserError: sigma is not positive, or all control points lie on a line, which has no normal directions here.
    """

    def __init__(
        self,
        gram: Tensor,
        segments: int,
        degree: int,
        sigma: float,
        prior: Literal["uniform", "arc-length"] = "uniform",
        nodes: int = 64,
    ) -> None:
        sigma = in_range("tunnel.sigma", sigma, Positive)
        if prior not in ("uniform", "arc-length"):
            raise UserError(f"tunnel.prior: expected uniform or arc-length, found {prior!r}; choose one")
        self.gram, self.segments, self.degree = gram.detach().double().cpu(), segments, degree
        self.sigma, self.prior, self.nodes = sigma, prior, nodes
        self.control, self.directions = _coordinates(self.gram)
        if self.control.shape[1] < 2:
            raise UserError(
                f"tunnel: expected control points that span a plane or more, found {len(gram)} on a line; "
                "train the inner points, or take a curve of more control points"
            )
        self._length = arc_length(self.gram, segments, degree)
        self._carry()

    @property
    def dimension(self) -> int:
        """D, the number of normal directions."""
        return self.control.shape[1] - 1

    def coefficients(self, t: Tensor, xi: Tensor) -> Tensor:
        """Coefficient rows ``[n, K]`` float64, summing to 1, of theta(t, xi) for t ``[n]`` and xi ``[n, D]``."""
        t = t.double().cpu()
        beside = torch.einsum("nkd,nd->nk", self.frame(t), xi.double().cpu())
        return coefficients(t, self.segments, self.degree) + beside

    def frame(self, t: Tensor) -> Tensor:
        """The normal vectors e_j(t) as combinations of the control points.

        Args:
            t: ``[n]``, in [0, 1].

        Returns:
            ``[n, K, D]`` float64: e_j(t) = sum_k frame[:, k, j] P_k; each column sums to 0.
        """
        t = t.double().cpu()
        segment = (self.segments * t).floor().long().clamp(0, self.segments - 1)
        u = self.segments * t - segment
        node = (u * self.nodes).floor().long().clamp(0, self.nodes - 1)
        place, tangent = self._local(segment, u)
        carried = _double_reflection(
            self._frames[segment, node], self._places[segment, node], self._tangents[segment, node], place, tangent
        )
        return self.directions @ carried

    def from_normal(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Prior quantiles: z ``[n, 1 + D]`` standard normal to t ``[n]`` and xi ``[n, D]`` distributed as the prior."""
        t = torch.special.ndtr(z[:, 0].double())
        if self.prior == "arc-length":
            t = arc_length_parameter(t, self.gram, self.segments, self.degree)
        return t, self.sigma * z[:, 1:].double()

    def _local(self, segment: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Places and unit tangents ``[n, R]`` by segment: at a joint each of the two segments has its own tangent."""
        d = self.degree
        own = self.control[segment.unsqueeze(-1) * d + torch.arange(d + 1)]

        def velocity(at: Tensor) -> Tensor:
            return torch.einsum("nj,njr->nr", derivative_coefficients(at, 1, d), own)

        place = torch.einsum("nj,njr->nr", coefficients(u, 1, d), own)
        moving, still = velocity(u), 1e-8 * self._length
        # Where the curve stands still (control points that coincide) it has the tangent of its surroundings.
        near = velocity((u + torch.where(u < 0.5, 1e-4, -1e-4)).clamp(0, 1))
        moving = torch.where(moving.norm(dim=1, keepdim=True) > still, moving, near)
        return place, moving / moving.norm(dim=1, keepdim=True).clamp_min(1e-300)

    def _carry(self) -> None:
        """Frames at the ends of all steps, ``[S, nodes + 1, R, D]``, with places and tangents there."""
        s, m = self.segments, self.nodes
        segment = torch.arange(s).repeat_interleave(m + 1)
        place, tangent = self._local(segment, torch.linspace(0, 1, m + 1, dtype=torch.float64).repeat(s))
        frames = [_complement(tangent[0])]
        for i in range(1, len(place)):
            step = (x.unsqueeze(0) for x in (frames[-1], place[i - 1], tangent[i - 1], place[i], tangent[i]))
            frames.append(_double_reflection(*step)[0])
        self._places, self._tangents = (x.view(s, m + 1, -1) for x in (place, tangent))
        self._frames = torch.stack(frames).view(s, m + 1, -1, self.dimension)


@dataclass(frozen=True)
class TunnelSamples:
    """Posterior samples in a tunnel, n consecutive states of one chain."""

    t: Tensor
    """[n] float64"""
    xi: Tensor
    """[n, D] float64, in units of distance"""
    coefficients: Tensor
    """[n, K] float64, what a model runs; equal weights"""
    log_likelihood: Tensor
    """[n] float64, in nats, not tempered"""
    evaluations: int
    """How often the likelihood was computed, warm-up included."""


def sample_tunnel(
    tunnel: Tunnel,
    log_likelihood: Callable[[Tensor], float],
    samples: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    warm_up: int = 50,
    thin: int = 1,
) -> TunnelSamples:
    """Draw from the tempered posterior p(t, xi) exp(log_likelihood / T) by elliptical slice sampling.

    Murray, Adams & MacKay 2010 (arXiv 1001.0175), figure 2, in the coordinates in which the prior is standard normal:
    exact, no step size to tune, never stuck. A state costs about three to six likelihoods. The first is on the curve.

    Args:
        tunnel: the tube and its prior.
        log_likelihood: of coefficients ``[K]``, in nats, summed over the data (or over a fixed subset times N / size);
            it has to return the same for the same coefficients.
        samples: how many states are kept.
        generator: CPU generator of the chain.
        temperature: T; 1 is Bayes' rule, larger values stay nearer the prior (`model_average.likelihood_weights`).
        warm_up: states dropped at first.
        thin: of so many states one is kept.

    Raises:
        UserError: a temperature that is not positive, fewer than one sample.
        ValueError: a likelihood that is not finite on the curve or not deterministic.
    """
    temperature = in_range("temperature", temperature, Positive)
    samples, thin = in_range("samples", samples, Points), in_range("thin", thin, Count)
    warm_up = in_range("warm_up", warm_up, Amount)
    evaluations = 0

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        nonlocal evaluations
        evaluations += 1
        t, xi = tunnel.from_normal(z[None])
        row = tunnel.coefficients(t, xi)[0]
        return t[0], xi[0], row, float(log_likelihood(row))

    def normal() -> Tensor:
        return torch.randn(1 + tunnel.dimension, generator=generator, dtype=torch.float64)

    def uniform() -> float:
        return float(torch.rand((), generator=generator, dtype=torch.float64))

    z = normal()
    z[1:] = 0
    state = evaluate(z)
    if not math.isfinite(state[3]):
        raise ValueError(f"expected a finite log-likelihood on the curve, found {state[3]}")
    kept: list[tuple[Tensor, Tensor, Tensor, float]] = []
    for step in range(warm_up + samples * thin):
        other, level = normal(), state[3] / temperature + math.log1p(-uniform())
        angle = 2 * math.pi * uniform()
        low, high = angle - 2 * math.pi, angle
        for _ in range(_MOST_SHRINKS):
            proposal = z * math.cos(angle) + other * math.sin(angle)
            found = evaluate(proposal)
            if found[3] / temperature >= level:
                break
            low, high = (angle, high) if angle < 0 else (low, angle)
            angle = low + (high - low) * uniform()
        else:
            raise ValueError("expected the same log-likelihood for the same coefficients, found others")
        z, state = proposal, found
        if step >= warm_up and (step - warm_up) % thin == thin - 1:
            kept.append(state)
    t, xi, rows = (torch.stack([s[i] for s in kept]) for i in range(3))  # type: ignore[misc]
    values = torch.tensor([s[3] for s in kept], dtype=torch.float64)
    return TunnelSamples(t, xi, rows, values, evaluations)


def _coordinates(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Control points in an orthonormal basis of their span, ``[K, R]``, and the basis as combinations, ``[K, R]``.

    Differences to the first control point are what spans it, so that the columns of the basis sum to 0.
    """
    differences = torch.eye(len(gram), dtype=torch.float64)[:, 1:]
    differences[0] = -1
    values, vectors = torch.linalg.eigh(differences.T @ gram @ differences)
    # Squared lengths. Small ones are rounding: of the largest, or of products of points far from the origin.
    kept = values > 1e-10 * values.max() + 1e-13 * gram.diagonal().max()
    values, vectors = values[kept], vectors[:, kept]
    basis = differences @ (vectors / values.sqrt())
    control = torch.cat([torch.zeros(1, len(values), dtype=torch.float64), vectors * values.sqrt()])
    return control, basis


def _reflect(vectors: Tensor, normal: Tensor) -> Tensor:
    """Reflect ``[n, R, m]`` in the hyperplanes normal to ``[n, R]``; a normal of length 0 leaves everything."""
    square = normal.square().sum(-1)[:, None, None]
    along = torch.einsum("nr,nrm->nm", normal, vectors).unsqueeze(1) * normal.unsqueeze(2)
    return vectors - torch.where(square > 0, 2 * along / square.clamp_min(1e-300), 0)


def _double_reflection(frame: Tensor, place: Tensor, tangent: Tensor, to_place: Tensor, to_tangent: Tensor) -> Tensor:
    """Carry frames ``[n, R, D]`` from one place and tangent ``[n, R]`` to the next with the least rotation."""
    both = torch.cat([frame, tangent.unsqueeze(2)], 2)
    # The first reflection swaps the places. Where there is no way between them (a kink, or rounding only) it swaps
    # tangent and minus tangent instead, so that the two reflections turn in the plane of the tangents.
    way = to_place - place
    ahead = (way * tangent).sum(-1, keepdim=True).square() > 0.01 * way.square().sum(-1, keepdim=True)
    way = torch.where(ahead, way, tangent)
    both = _reflect(both, way)
    return _reflect(both, to_tangent - both[:, :, -1])[:, :, :-1]


def _complement(tangent: Tensor) -> Tensor:
    """Orthonormal directions ``[R, R - 1]`` normal to a unit vector, by the reflection that takes an axis to it."""
    axis = torch.zeros_like(tangent)
    axis[0] = 1.0 if tangent[0] < 0 else -1.0
    return _reflect(torch.eye(len(tangent), dtype=torch.float64)[None, :, 1:], (tangent - axis)[None])[0]
