"""A Gaussian over the answer rows at every point of a curve: a mixture of Laplace approximations.

Point i of a curve gives logits W_i h with answer rows W_i [C, d] and the last hidden state h [d] (with a bias: of h and
a 1). Around W_i lies a Gaussian (Eschenhagen et al. 2021; last layer alone: Kristiadi et al. 2020) whose precision is

    tau I + N/n sum_rows (diag p - p p^T) (x) h h^T

in orthonormal contrasts of the classes: softmax sees nothing of a shift of all logits, and other log-odds would give
the prior another shape. Up to `MOST_EXACT` dimensions that is what is used; above, its Kronecker form tau I + G (x) A
with G the mean of diag p - p p^T and A = N/n sum h h^T.

Scores of whole texts have no rows of their own. There the model is a conditional logit on top of the scores, with the
mean hidden state u_c over a choice's own tokens as its features and coefficients of mean 0:

    tau I + N/n sum_rows sum_c p_c (u_c - u)(u_c - u)^T,    u = sum_c p_c u_c

What a Gaussian means for the probabilities is found by nodes or draws of the logits. Closed forms (probit, bridge) have
no spread, and with it no information within the point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.quasirandom import SobolEngine

from loracurve.inference.calibration import apply_temperature, fit_temperature
from loracurve.inference.hidden_states import SplitStates
from loracurve.inference.information import entropy, mixture_log_probs, negative_log_likelihood
from loracurve.inference.prediction import Read
from loracurve.model.states import States
from loracurve.system.errors import UserError
from loracurve.tasks.batching import Batch

__all__ = [
    "DRAWS",
    "MOST_EXACT",
    "LARGEST_TAU",
    "SMALLEST_TAU",
    "Gaussians",
    "contrasts",
    "fit_gaussians",
    "marginal_tau",
    "validation_tau",
]


Form = Literal["exact", "kronecker", "choices"]

MOST_EXACT = 4096
"""Dimensions, contrasts of the classes times features, up to which the precision is not approximated."""

SMALLEST_TAU, LARGEST_TAU = 1e-12, 1e12
"""What a variance can still be computed with."""

DRAWS = 128
"""Draws of the logits, for more than two classes."""

_NODES = 129  # for two classes
_REACH = 8.0  # of the nodes, in standard deviations

_TAUS = torch.logspace(-1, 6, 15, dtype=torch.float64)

_LEFT_OUT = 1e-3

_MOST_CLASSES = 2**20

# Numbers that a batch of draws may hold.
_MOST_DRAWN = 2**24

# A validation NLL above the best by less than this part of it, or these nats, is as good: after temperature the NLL of
# separable rows is rounding, of which a part says nothing.
_AS_GOOD = 0.003
_AS_GOOD_NATS = 1e-4


def contrasts(classes: int) -> Tensor:
    """[C, C - 1] float64, orthonormal columns that sum to 0 (Helmert)."""
    columns = torch.tril(torch.ones(classes, classes, dtype=torch.float64), -1).mT[:, 1:]
    columns = columns - torch.diag_embed(torch.arange(1, classes, dtype=torch.float64), -1)[:, : classes - 1]
    return columns / columns.norm(dim=0)


@dataclass(frozen=True)
class Gaussians:
    """Gaussians at n points, by the eigenvectors of their curvatures; made by `fit_gaussians`."""

    form: Form
    values: Tensor
    """[n, R] eigenvalues; exact: of D = (C - 1) d', kronecker: of A, D = d', choices: D = d (d' = d + 1 with a bias)"""
    vectors: Tensor
    """[n, D, R], in columns: all, or those whose eigenvalues count (`narrowed`); the others' are 0"""
    class_values: Tensor
    """[n, C - 1] of G (kronecker), else [n, 0]"""
    class_vectors: Tensor
    """[n, C - 1, C - 1] in columns, else [n, 0, 0]"""
    squares: Tensor
    """[n], |W_i|^2 in the same contrasts; 0 for choices"""
    classes: int
    """C; for choices the most that training rows have"""
    bias: bool
    rows: int
    """training rows that were looked at"""
    of: int
    """training rows that these stand for"""
    tau: float = 1.0
    """prior precision of each coefficient"""

    def check(self, points: int) -> None:
        """Raise ValueError for tensors whose shapes do not belong together, or numbers that no fit gives."""
        rank, size = self.values.shape[-1], self.vectors.shape[1:2].numel()
        k = self.classes - 1 if self.form == "kronecker" else 0
        expected = {
            "values": (points, rank),
            "vectors": (points, size, rank),
            "class_values": (points, k),
            "class_vectors": (points, k, k),
            "squares": (points,),
        }
        for name, shape in expected.items():
            found: Tensor = getattr(self, name)
            if tuple(found.shape) != shape or not found.is_floating_point() or not found.isfinite().all():
                raise ValueError(f"{name} of shape {list(found.shape)} or without finite numbers")
        if self.form not in get_args(Form) or self.classes < 2 or not SMALLEST_TAU <= self.tau <= LARGEST_TAU:
            raise ValueError(f"form {self.form!r}, {self.classes} classes, tau {self.tau}")
        if self.form == "exact" and (size < self.classes - 1 or size % (self.classes - 1)):
            raise ValueError(f"{size} dimensions for {self.classes} classes")
        if self.classes > _MOST_CLASSES or any(bool((x < 0).any()) for x in (self.values, self.class_values)):
            raise ValueError("eigenvalues below 0, or more classes than can be")
        for vectors in (self.vectors, self.class_vectors):
            if not torch.allclose(vectors.mT @ vectors, torch.eye(vectors.shape[-1], dtype=vectors.dtype), atol=1e-3):
                raise ValueError("eigenvectors that are not orthonormal")

    def narrowed(self, tau: float) -> Gaussians:
        """With this tau, and without the eigenvectors whose eigenvalues it outweighs at every point: no variance
        changes by more than a part of `_LEFT_OUT`."""
        most = self.values if self.form != "kronecker" else self.values * self.class_values.amax(1, keepdim=True)
        kept = (most > _LEFT_OUT * tau).any(0)
        return replace(self, tau=tau, values=self.values[:, kept], vectors=self.vectors[:, :, kept].contiguous())

    def read(self, log_probs: Tensor, states: States, batch: Batch) -> Read:
        """As `prediction.Reader`: averages over the Gaussians."""
        labels = batch.labels.to(log_probs.device)
        own = -negative_log_likelihood(log_probs, labels.clamp_min(0)).masked_fill(labels < 0, 0)
        return replace(self.averaged(log_probs, states), model_label_log_probs=own)

    def averaged(self, log_probs: Tensor, states: States) -> Read:
        """Log-probabilities [n, E, C] of the points averaged over their Gaussians, and what each leaves open [n, E].

        Classes beyond those of training get no spread of their own.

        Raises:
            ValueError: another number of points, or features of another size.
        """
        if len(log_probs) != len(self.values):
            raise ValueError(f"expected Gaussians at {len(log_probs)} points, found {len(self.values)}")
        found = [self._at(i, x.double(), _of_point(states, i)) for i, x in enumerate(log_probs)]
        averages, left = zip(*found, strict=True)
        return Read(torch.stack(averages).to(log_probs.dtype), torch.stack(left))

    def _at(self, point: int, log_probs: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """[E, C] log-probabilities averaged over the point's Gaussian, and [E] the mean entropy of its draws."""
        examples, classes = log_probs.shape
        size = max(1, _MOST_DRAWN // (_NODES * classes))
        averages, left = [], []
        for x, h in zip(log_probs.split(size), states.split(size), strict=True):
            factor = self._factor(point, h, x)
            nodes, weights = _nodes(factor.shape[-1], x.device)
            # [S, E, C]; choices that are not there stay at -inf.
            drawn = (x + torch.einsum("eck,sk->sec", factor, nodes)).log_softmax(-1)
            averages.append(mixture_log_probs(drawn, weights))
            left.append(weights @ entropy(drawn))
        if not examples:
            return log_probs, log_probs[:, 0]
        return torch.cat(averages), torch.cat(left)

    def _factor(self, point: int, states: Tensor, log_probs: Tensor) -> Tensor:
        """[E, C, k], with which standard normal numbers [k] become deviations of the logits."""
        device, classes = states.device, log_probs.shape[-1]
        values, vectors = self.values[point].to(device), self.vectors[point].to(device, torch.float64)
        if self.form == "choices":
            return _factor_of_choices(states.double(), log_probs, values, vectors, self.tau)
        h = _features(states, self.bias)
        if self.form == "exact":
            projected = torch.einsum("ed,cdk->eck", h, vectors.unflatten(0, (self.classes - 1, -1)))
            own = torch.eye(self.classes - 1, dtype=torch.float64, device=device) * h.square().sum(1)[:, None, None]
            factor = contrasts(self.classes).to(device) @ _cholesky(_inverse(projected, own, values, self.tau))
        else:
            of_classes = self.class_values[point].to(device)
            inside = (h @ vectors).square()
            spread = inside @ (1 / (values[:, None] * of_classes + self.tau))  # [E, C - 1]
            spread = spread + ((h.square().sum(1) - inside.sum(1)).clamp_min(0) / self.tau)[:, None]
            turned = contrasts(self.classes).to(device) @ self.class_vectors[point].to(device, torch.float64)
            factor = turned * spread.sqrt()[:, None]
        if classes > self.classes:
            return torch.cat([factor, factor.new_zeros(len(h), classes - self.classes, factor.shape[-1])], 1)
        return factor[:, :classes]

    def covariance(self, point: int, states: Tensor, log_probs: Tensor) -> Tensor:
        """[E, C, C] float64, of the logits at a point, each row of it centred.

        Args:
            states: [E, d], for choices [E, C, d].
            log_probs: [E, C], -inf where there is no such choice.
        """
        factor = self._factor(point, states, log_probs)
        return factor @ factor.mT


def fit_gaussians(train: SplitStates, rows: Tensor, total: int | None = None) -> Gaussians:
    """The curvature at every point, with tau 1 (`marginal_tau` and `validation_tau` find better ones).

    Args:
        train: of training rows.
        rows: [n, C, d + 1] weight and bias of the last map at the points (`Runner.last_rows`); not looked at for
            choices.
        total: N, the rows that the model was trained on; all of `train` if None.

    Raises:
        UserError: no rows, one class, language modelling.
    """
    points, count, classes = train.log_probs.shape
    if not count:
        raise UserError("Gaussians: expected training rows, found none; give the data of the run")
    if classes == 0:
        raise UserError("Gaussians: expected a task with classes, found language modelling; familiarity works there")
    if classes == 1:
        raise UserError("Gaussians: expected at least two classes, found one")
    times = (total or count) / count
    about: dict[str, Any] = {"classes": classes, "rows": count, "of": total or count}
    choices = train.states.choices
    if choices is not None:
        found = [
            _of_choices(x.double().exp(), u.double(), times) for x, u in zip(train.log_probs, choices, strict=True)
        ]
        none = torch.zeros(points, 0, dtype=torch.float64)
        squares = torch.zeros(points, dtype=torch.float64)
        return Gaussians("choices", *_stacked(found), none, torch.zeros(points, 0, 0), squares, bias=False, **about)
    bias = bool(rows[..., -1].any())
    v = contrasts(classes).to(rows.device)
    own = rows if bias else rows[..., :-1]
    squares = torch.einsum("ncd,ck->nkd", own, v).square().sum((1, 2)).cpu()
    size = (classes - 1) * own.shape[-1]
    pairs = [
        _curvature(x.double().exp(), _features(h, bias), times, size <= MOST_EXACT)
        for x, h in zip(train.log_probs, train.states.read, strict=True)
    ]
    values, vectors = _stacked([big for big, _ in pairs])
    class_values, class_vectors = _stacked([small for _, small in pairs])
    form: Form = "exact" if size <= MOST_EXACT else "kronecker"
    return Gaussians(form, values, vectors, class_values, class_vectors, squares, bias=bias, **about)


_Eigen = tuple[Tensor, Tensor]


def _curvature(probs: Tensor, h: Tensor, times: float, exact: bool) -> tuple[_Eigen, _Eigen]:
    """Eigenvalues and -vectors of the curvature, and of G where A is not all."""
    v = contrasts(probs.shape[1]).to(probs.device)
    turned = probs @ v
    # [rows, C - 1, C - 1]: diag p - p p^T in contrasts.
    open_ = torch.einsum("ck,rc,cl->rkl", v, probs, v) - turned[:, :, None] * turned[:, None]
    if not exact:
        return _eigen(h.mT @ h * times), _eigen(open_.mean(0))
    k, d = v.shape[1], h.shape[1]
    whole = h.new_zeros(k, d, k, d)
    for a in range(k):
        for b in range(a + 1):
            block = (h * open_[:, a, b, None]).mT @ h * times
            whole[a, :, b], whole[b, :, a] = block, block.mT
    none = h.new_zeros(0)
    return _eigen(whole.view(k * d, k * d)), (none, none.view(0, 0))


def _of_choices(probs: Tensor, u: Tensor, times: float) -> _Eigen:
    centred = u - torch.einsum("rc,rcd->rd", probs, u)[:, None]
    weighted = (probs.sqrt()[..., None] * centred).flatten(0, 1)
    return _eigen(weighted.mT @ weighted * times)


def _eigen(matrix: Tensor) -> _Eigen:
    if not matrix.isfinite().all():
        raise UserError("Gaussians: expected finite hidden states and probabilities, found others")
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0), vectors


def _stacked(found: list[_Eigen]) -> tuple[Tensor, Tensor]:
    """[n, D] float64 and [n, D, D] float32, on the CPU."""
    return torch.stack([x.cpu() for x, _ in found]), torch.stack([x.float().cpu() for _, x in found])


def _inverse(projected: Tensor, own: Tensor, values: Tensor, tau: float) -> Tensor:
    """[E, k, k], x (V diag(l) V^T + tau I)^-1 x^T from projections x V [E, k, R] and x x^T [E, k, k]."""
    inside = projected * (1 / (values + tau) - 1 / tau)
    return inside @ projected.mT + own / tau


def _factor_of_choices(u: Tensor, log_probs: Tensor, values: Tensor, vectors: Tensor, tau: float) -> Tensor:
    """[E, C, C - 1] from features [E, C, d]: a factor of the scores' centred covariance, among the choices that are
    there."""
    factor = u.new_zeros(*u.shape[:2], max(u.shape[1] - 1, 1))
    counts = log_probs.isfinite().sum(1)
    for count in counts.unique().tolist():
        if count > 1:
            rows, v = (counts == count).nonzero()[:, 0], contrasts(count).to(u.device)
            turned = torch.einsum("ck,ecd->ekd", v, u[rows, :count])
            covariance = _inverse(turned @ vectors, turned @ turned.mT, values, tau)
            factor[rows, :count, : count - 1] = v @ _cholesky(covariance)
    return factor


def _cholesky(covariance: Tensor) -> Tensor:
    """Lower factor [E, k, k] of covariances that may be singular: two choices of the same words."""
    size = covariance.shape[-1]
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    least = torch.finfo(torch.float64).eps * size * trace + torch.finfo(torch.float64).tiny
    return torch.linalg.cholesky(
        covariance + 8 * least * torch.eye(size, dtype=torch.float64, device=covariance.device)
    )


def _features(states: Tensor, bias: bool) -> Tensor:
    """[E, d'] float64: what the answer rows are multiplied by."""
    h = states.double()
    return torch.cat([h, torch.ones_like(h[:, :1])], 1) if bias else h


def _of_point(states: States, point: int) -> Tensor:
    return (states.read if states.choices is None else states.choices)[point]


@cache
def _nodes_on_cpu(size: int) -> tuple[Tensor, Tensor]:
    if size == 1:
        # Equal steps: for smooth functions that fall off like a Gaussian no rule converges faster (Trefethen & Weideman
        # 2014), and where the spread is large, so that sigmoids become steps, Gauss-Hermite nodes lie too far apart.
        nodes = torch.linspace(-_REACH, _REACH, _NODES, dtype=torch.float64)
        weights = (-nodes.square() / 2).exp()
        return nodes[:, None], weights / weights.sum()
    drawn = SobolEngine(size, scramble=True, seed=0).draw(DRAWS, dtype=torch.float64)
    nodes = torch.special.ndtri(drawn.clamp(1e-9, 1 - 1e-9))
    return nodes, torch.full((DRAWS,), 1 / DRAWS, dtype=torch.float64)


def _nodes(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes [S, k] of the standard normal distribution and their weights [S], the same for all examples."""
    nodes, weights = _nodes_on_cpu(size)
    return nodes.to(device), weights.to(device)


def marginal_tau(gaussians: Gaussians) -> float:
    """The tau of the highest marginal likelihood (MacKay 1992), one for all points; the prior mean is 0.

    log p(data | tau) is, up to what tau does not move, the sum over points of
    (D log tau - sum_j log(l_j + tau) - tau |W_i|^2) / 2.

    Raises:
        UserError: scores of whole texts, whose coefficients are 0 at their mean: the likelihood would only grow.
    """
    if gaussians.form == "choices":
        raise UserError(
            "tau: expected validation for scoring text, where nothing is learnt of the prior, found marginal"
        )
    values = gaussians.values
    if gaussians.form == "kronecker":
        values = (values[:, :, None] * gaussians.class_values[:, None]).flatten(1)
    squares = gaussians.squares

    def cost(log_tau: float) -> float:
        tau = math.exp(log_tau)
        terms = values.shape[1] * log_tau - (values + tau).log().sum(1) - tau * squares
        return -float(terms.sum()) / 2

    found = minimize_scalar(cost, bounds=(math.log(1e-6), math.log(1e10)), method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x)


def validation_tau(gaussians: Gaussians, validation: SplitStates, weights: Tensor | None = None) -> float:
    """The smallest tau of a grid that costs nothing: validation NLL as it is and after temperature are both within .3 %
    of their best, or 1e-4 nats; where no tau does both, the one of the best NLL as it is.

    The smallest, because spread far from the training data is what the Gaussians are for: it is as large as the known
    data allow.

    Raises:
        UserError: no labelled validation rows.
    """
    labelled = (validation.labels >= 0).nonzero()[:, 0]
    if not len(labelled):
        raise UserError("tau: expected labelled validation rows to choose it by, found none")
    rows = validation.index(labelled)
    plain: list[float] = []
    after: list[float] = []
    for tau in _TAUS.tolist():
        read = replace(gaussians, tau=tau).averaged(rows.log_probs, rows.states)
        average = mixture_log_probs(read.log_probs.double(), weights)
        tempered = apply_temperature(average, fit_temperature(average, rows.labels))
        for found, log_probs in ((plain, average), (after, tempered)):
            found.append(float(negative_log_likelihood(log_probs, rows.labels).mean()))
    most = [min(found) + max(min(found) * _AS_GOOD, _AS_GOOD_NATS) for found in (plain, after)]
    good = [a <= most[0] and b <= most[1] for a, b in zip(plain, after, strict=True)]
    return float(_TAUS[good.index(True) if any(good) else plain.index(min(plain))])
