"""Mixtures of stored predictions: do weights by likelihood help, and does a curve hold what discrete methods miss?"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import mixture_weights
from loracurve.bench.registry import method_name
from loracurve.bench.results import CellResult, Results, seed_of, shared_seeds, stacked
from loracurve.bench.statistics import novel_share
from loracurve.bench.suite import full_ensemble, method_of
from loracurve.bench.tables.table import Table, Value
from loracurve.inference.information import mixture_log_probs, pairwise_jensen_shannon
from loracurve.inference.intervals import Interval, bootstrap_interval
from loracurve.inference.model_average import effective_points, fit_likelihood_temperature, likelihood_weights

__all__ = ["against_discrete", "weighted_points"]


def weighted_points(results: Results) -> Table:
    """Lines and curves averaged with the weights of the tempered likelihood instead of their own."""
    table = Table(
        "weighted_points",
        "Points weighted by their validation likelihood",
        ["task", "method", "T", "effective points", "points", "NLL", "NLL weighted", "weighted minus unweighted"],
        notes="w_i ~ exp(-N L(t_i) / T) over validation rows, T chosen on them too (a large T leaves equal weights); "
        "means over seeds, T: geometric. The difference is paired, with its 95 % bootstrap interval over test rows.",
    )
    for task, method, done in results.each():
        if results.positions(done) is None or len(done[0].test.weights) < 2:
            continue
        temperatures, sizes, values = [], [], []
        for result in done:
            nll, prior = result.point_nll("validation"), result.test.weights
            temperature = fit_likelihood_temperature(nll, prior)
            weights = likelihood_weights(nll.sum(1), prior, temperature)
            temperatures.append(temperature)
            sizes.append(effective_points(weights))
            values.append(_mixed(result, weights))
        own, weighted = stacked(done, "nll"), torch.stack(values).mean(0)
        row: list[Value] = [task, method, statistics.geometric_mean(temperatures), statistics.mean(sizes)]
        row += [len(done[0].test.weights), own.mean().item(), weighted.mean().item()]
        table.rows.append([*row, bootstrap_interval(weighted - own, seed_of(task, "comparison"))])
    return table


def against_discrete(results: Results) -> Table:
    """Curves and lines against the best convex mix of their anchors' predictions, and against samples of SWAG."""
    others = [n for n, m in results.suite.methods.items() if method_name(m) == "swag"]
    table = Table(
        "against_discrete",
        "Functions that discrete and local methods miss",
        [
            *("task", "method", "NLL", "mix of anchors", "minus the mix", "mix with the points", "points add"),
            *(f"minus {n}" for n in others),
            *(
                "pairwise JSD",
                "anchors' JSD",
                *(f"{n}'s JSD" for n in others),
                "novel",
                *(f"{n} novel" for n in others),
            ),
        ],
        notes="mix of anchors: the convex mix of the probabilities of the curve's anchors with the lowest validation "
        "NLL; mix with the points: the same of anchors and points of the curve together; points add: this mix minus "
        "that of the anchors. Differences of test NLL in nats, paired, means over seeds with 95 % bootstrap intervals "
        "over test rows. novel: share of test rows to which a point gives a class that no anchor gives.",
    )
    for task, method, _ in results.each():
        if not isinstance(method_of(results.suite, method), Curve) or not (count := results.anchors_of(method)):
            continue
        done, whole = shared_seeds(results.seeds(task, method), results.seeds(task, full_ensemble(results.suite)))
        if not done or not done[0].keeps_points:
            continue
        mixes, joint, jsd, novel = [], [], [], []
        for mine, anchors in zip(done, whole, strict=True):
            points = anchors.points("test")[:count]
            mixes.append(_best_mix([(anchors, count)]))
            joint.append(_best_mix([(anchors, count), (mine, None)]))
            jsd.append(_mean_jsd(points))
            novel.append(novel_share(mine.points("test"), points))
        own, mixed, together = stacked(done, "nll"), torch.stack(mixes).mean(0), torch.stack(joint).mean(0)
        row: list[Value] = [task, method, own.mean().item(), mixed.mean().item(), _difference(task, own, mixed)]
        row += [together.mean().item(), _difference(task, together, mixed)]
        rivals = [shared_seeds(done, results.seeds(task, n)) for n in others]
        row += [_difference(task, stacked(a, "nll"), stacked(b, "nll")) if a else None for a, b in rivals]
        row += [results.figure(task, method, "test", "pairwise_jsd"), sum(jsd) / len(jsd)]
        row += [results.figure(task, n, "test", "pairwise_jsd") for n in others]
        row.append(sum(novel) / len(novel))
        for name in others:
            pairs = zip(*shared_seeds(results.seeds(task, name), whole), strict=True)
            shares = [novel_share(a.points("test"), b.points("test")[:count]) for a, b in pairs]
            row.append(sum(shares) / len(shares) if shares else None)
        table.rows.append(row)
    return table


def _difference(task: str, first: Tensor, second: Tensor) -> Interval:
    return bootstrap_interval(first - second, seed_of(task, "comparison"))


def _mixed(result: CellResult, weights: Tensor) -> Tensor:
    """``[E]`` test NLL of the average with other weights ``[n]``."""
    return -mixture_log_probs(-result.point_nll("test"), weights)


def _best_mix(parts: list[tuple[CellResult, int | None]]) -> Tensor:
    """``[E]`` test NLL of the convex mix of the first points of several cells that validation rows choose."""
    validation, test = (-torch.cat([r.point_nll(s)[:n] for r, n in parts]) for s in ("validation", "test"))
    return -mixture_log_probs(test, mixture_weights(validation))


def _mean_jsd(points: Tensor) -> float:
    return pairwise_jensen_shannon(points.double()).mean().item()
