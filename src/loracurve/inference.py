"""Bayesian model averages along a curve: quadratures over t, weights of the points, and what is predicted with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from loracurve.curve import gauss_legendre, speed
from loracurve.distributed import gathered
from loracurve.errors import UserError
from loracurve.predictive import Predictive

__all__ = [
    "PointModel",
    "Predictive",
    "Rule",
    "arc_length_weights",
    "effective_points",
    "evaluation_mode",
    "likelihood_weights",
    "predict",
    "quadrature",
    "without_gradients",
]

Rule = Literal["uniform", "gauss-legendre", "monte-carlo"]


def quadrature(
    kind: Rule, points: int, segments: int, generator: torch.Generator | None = None, closed: bool = False
) -> tuple[Tensor, Tensor]:
    """Points t and weights, both ``[points]`` float64, for averages over t uniform on [0, 1]; the weights sum to 1.

    uniform is equally spaced with both ends and equal weights (one point: t = 0.5; closed curves: with one of the
    ends, which are the same), gauss-legendre puts points / segments nodes into each segment, monte-carlo draws from
    `generator`.

    Raises:
        UserError: unknown kind, fewer than one point, or for gauss-legendre no multiple of `segments`.
        ValueError: monte-carlo without a generator.
    """
    if points < 1:
        raise UserError(f"points: expected at least 1, found {points}; ask for 10")
    weights = torch.full((points,), 1 / points, dtype=torch.float64)
    if kind == "uniform" and closed:
        return torch.arange(points, dtype=torch.float64) / points, weights
    if kind == "uniform":
        return (torch.linspace(0, 1, points, dtype=torch.float64) if points > 1 else weights / 2), weights
    if kind == "monte-carlo":
        if generator is None:
            raise ValueError("expected a torch.Generator for monte-carlo points, found None")
        return torch.rand(points, generator=generator, dtype=torch.float64, device=generator.device), weights
    if kind == "gauss-legendre":
        if points % segments:
            close = max(round(points / segments), 1) * segments
            raise UserError(f"points: expected a multiple of the {segments} segments, found {points}; ask for {close}")
        nodes, node_weights = gauss_legendre(points // segments)
        t = (torch.arange(segments, dtype=torch.float64).unsqueeze(1) + nodes) / segments
        return t.flatten(), (node_weights / segments).repeat(segments)
    raise UserError(f"quadrature: expected uniform, gauss-legendre or monte-carlo, found {kind!r}; choose one of them")


def arc_length_weights(t: Tensor, w: Tensor, gram: Tensor, segments: int, degree: int) -> Tensor:
    """Prior uniform in arc length: w_i ||theta'(t_i)||, normalised, ``[n]``; `w` itself for a curve of length 0."""
    weights = w * speed(t, gram, segments, degree).to(w)
    return weights / weights.sum() if weights.sum() > 0 else w


def likelihood_weights(total_nll: Tensor, prior_weights: Tensor, temperature: float) -> Tensor:
    """Tempered posterior over the points, w_i ~ prior_i exp(-total_nll_i / T), ``[n]`` float64, summing to 1.

    `total_nll` ``[n]`` is summed over the data, in nats. T = 1 is Bayes' rule, T = infinity leaves the prior.

    Raises:
        UserError: T is not positive.
        ValueError: no point has a finite likelihood and a positive prior weight.
    """
    if not temperature > 0:
        raise UserError(f"temperature: expected a number above 0, found {temperature}; raise it")
    weights = (prior_weights.double().log() - total_nll.double() / temperature).softmax(0)
    if weights.isnan().any():
        raise ValueError(f"expected finite total NLL at some point, found {total_nll.tolist()}")
    return weights


def effective_points(weights: Tensor) -> float:
    """1 / sum w_i^2 (Kish): how many equally weighted points would average as much."""
    return 1 / weights.double().square().sum().item()


class PointModel(Protocol):
    """A module that predicts at several points of a curve at once, such as `CurveModel`."""

    def point_log_probs(self, batch: Any, t: Tensor) -> Tensor:
        """Normalised float32 log-probabilities ``[n, E, C]`` of the batch at the points t ``[n]``."""
        ...

    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...


def without_gradients(model: object) -> AbstractContextManager[object]:
    """Inference mode; of a base that is spread over processes, whose gathered weights training uses again, no-grad."""
    return torch.no_grad() if getattr(model, "sharded", False) else torch.inference_mode()


@contextmanager
def evaluation_mode(model: PointModel | nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule has its own training flag again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def predict(
    model: PointModel,
    batches: Iterable[Any],
    t: Tensor,
    weights: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    summarise: bool = False,
    examples: int | None = None,
    shared: bool = False,
) -> Predictive:
    """Predict every example at every curve point, in evaluation mode and without gradients.

    Args:
        model: see `PointModel`.
        batches: whatever the model takes, each with ``.index``, the numbers ``[E]`` of its examples (together 0..N-1,
            each once, in any order), and for `summarise` ``.labels`` ``[E]``.
        t: curve points ``[n]``.
        weights: their weights ``[n]``; equal weights if None.
        progress: called after each batch with the number of examples done.
        summarise: keep only per-example summaries (`Predictive.summarise`).
        examples: N where it is known; without it examples missing at the very end go unnoticed.
        shared: the batches hold this process's share of the examples (`evaluation_batches`); every process calls this
            and returns the whole.

    Returns:
        The predictions of examples 0..N-1 in this order, on the CPU.

    Raises:
        RuntimeError: an example is missing or there twice, or the model returned another shape.
    """
    outputs, parts, indices, done, idle = [], [], [torch.zeros(0, dtype=torch.long)], 0, 0
    if shared and getattr(model, "sharded", False):
        batches = [*batches]
        passes = sum(model.passes(batch, len(t)) for batch in batches)  # type: ignore[attr-defined]
        idle = max(gathered(lambda: passes)) - passes
    with without_gradients(model), evaluation_mode(model):
        for batch in batches:
            log_probs = model.point_log_probs(batch, t)
            if log_probs.shape[:-1] != (len(t), len(batch.index)):
                raise RuntimeError(f"expected [{len(t)}, {len(batch.index)}, C], found {list(log_probs.shape)}")
            if summarise:
                parts.append(Predictive.from_log_probs(log_probs, weights).summarise(batch.labels).to("cpu"))
            else:
                outputs.append(log_probs)
            indices.append(batch.index)
            done += len(batch.index)
            if progress is not None:
                progress(done)
        for _ in range(idle):
            model.idle()  # type: ignore[attr-defined]

    def own() -> tuple[Tensor, list[Predictive]]:
        # Outside inference mode: its tensors could not take part in later gradients (temperature fits).
        summaries = parts if summarise else [Predictive.from_log_probs(part.cpu(), weights) for part in outputs]
        return torch.cat([index.cpu() for index in indices]), summaries

    found = gathered(own) if shared else [own()]
    order, done = torch.cat([index for index, _ in found]), sum(len(index) for index, _ in found)
    expected = done if examples is None else examples
    if not done or not torch.equal(order.sort().values, torch.arange(expected)):
        missing = set(range(expected)) - set(order.tolist())
        raise RuntimeError(
            f"expected each of the examples 0..{expected - 1} once, found {done}, without {sorted(missing)[:5]}; "
            "the batches dropped or repeated some"
        )
    return Predictive.cat([part for _, parts in found for part in parts]).index(order.argsort())
