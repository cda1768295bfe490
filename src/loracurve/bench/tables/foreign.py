"""Rows of other sets: how well each score tells them from the task's, and what answering a stream with some costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from loracurve.bench.results import CellResult, Results, seed_of, shared_seeds
from loracurve.bench.suite import full_ensemble
from loracurve.bench.tables.resampled import (
    FIGURES,
    SCORES,
    Resampled,
    counts_of,
    over_groups,
    over_seeds,
    resampled,
    scores_of,
)
from loracurve.bench.tables.table import Table, Value
from loracurve.inference import metrics
from loracurve.inference.familiarity import p_values
from loracurve.inference.intervals import interval_of, resampled_aurc

__all__ = ["ALPHA", "SHARE", "Order", "foreign", "orders_of", "pairs_of", "stream", "stream_risk", "text_length"]


SHARE = 0.1
"""Part of the stream that is foreign."""

ALPHA = 0.05
"""p-value of the distance below which a row comes last."""

Order = Literal["entropy", "MI", "W", "two reasons"]
"""What a stream is answered by, lowest first; two reasons: entropy, but rows far from the training data come last."""

_RESAMPLES = 500  # of a stream: half as many as elsewhere, because each takes a new draw of foreign rows

_STREAMS = 50  # draws of foreign rows that an estimate averages over

Pair = tuple[str, str]
"""A task and the set whose rows are foreign to it."""


def pairs_of(results: Results, method: str, score: str) -> list[Pair]:
    """The pairs on which a method gives a score."""
    found = [(t, results.seeds(t, method)) for t in results.suite.tasks]
    there = [(t, done[0]) for t, done in found if done and all(score in scores_of(r.test) for r in done)]
    return [(t, w) for t, first in there for w in first.predictions.sets if w.startswith("ood:")]


def foreign(results: Results) -> Table:
    """AUROC of foreign rows by each score, means over pairs and seeds, beside the full ensemble's by entropy."""
    whole = full_ensemble(results.suite)
    table = Table(
        "foreign",
        "Telling foreign rows from the task's: means over pairs and seeds",
        [
            "method",
            "score",
            "pairs",
            "AUROC",
            f"minus {whole} by entropy",
            "with tasks drawn",
            "better on",
            "AUPR",
            "FPR95",
        ],
        notes="Positives: rows of sets foreign to the task. W: mutual information within points. Intervals: 95 % "
        "bootstrap over seeds and rows; with tasks drawn: over tasks, seeds and rows. better on: pairs with the higher "
        "estimate. AUPR: as if there were as many positives as negatives. Length: the better of shortest and longest "
        "first, which nobody knows beforehand.",
    )
    for method in dict.fromkeys(m for _, m, _ in results.each()):
        for score in SCORES:
            if not (pairs := pairs_of(results, method, score)):
                continue

            def measured(result: CellResult, where: str, own: str = score) -> Resampled:
                return resampled(result, where, own, "auroc")

            def reference(result: CellResult, where: str) -> Resampled:
                return resampled(result, where, "entropy", "auroc")

            row = _compared(results, method, pairs, measured, reference, larger=True)
            further = [
                _mean([results.figure(t, method, w, f"{name}_{FIGURES[score]}") for t, w in pairs])
                for name in ("aupr", "fpr95")
            ]
            table.rows.append([method, score, len(pairs), *row, *further])
    if length := text_length(results):
        table.rows.append(["the prompt's length", "tokens", len(length), _mean([*length.values()]), *[None] * 5])
    return table


def text_length(results: Results) -> dict[Pair, float]:
    """AUROC of foreign rows by the length of their prompts, shortest or longest first, whichever is better: what a
    score must exceed to have seen more than that. Empty for stores that keep no lengths."""
    found: dict[Pair, float] = {}
    for task, _, done in results.each():
        for where, other in done[0].predictions.tokens.items():
            if where.startswith("ood:") and (task, where) not in found:
                test = done[0].predictions.tokens["test"]
                positive = torch.cat([torch.zeros(len(test)), torch.ones(len(other))]).bool()
                value = metrics.auroc(torch.cat([test, other]), positive).value
                assert value is not None
                found[task, where] = max(value, 1 - value)
    return found


def stream(results: Results) -> Table:
    """What answering costs on a stream with foreign rows, where answering one of them is an error; for suites some of
    whose methods measure a distance from the training data."""
    whole = full_ensemble(results.suite)
    table = Table(
        "stream",
        f"A stream of test rows with {SHARE:.0%} foreign rows: means over pairs and seeds",
        ["method", "order", "pairs", "AURC", f"minus {whole} by entropy", "with tasks drawn", "better on"]
        + [f"risk at {c:.0%}" for c in _COVERAGES],
        notes="Rows are answered in the order of one number; answering a foreign row is an error. AURC: area under "
        "risk against coverage, the mean risk over all coverages. two reasons: by entropy, but rows whose distance "
        f"from the training data has a p-value below {ALPHA:g} on validation rows come last. risk at 80 %: share of "
        "errors among the answers when 80 % are answered. Intervals as in the table of foreign rows.",
    )
    methods = list(dict.fromkeys(m for _, m, _ in results.each()))
    for method in methods if any("two reasons" in orders_of(results, m) for m in methods) else []:
        for order in orders_of(results, method):
            pairs = pairs_of(results, method, _NEEDS[order])

            def measured(result: CellResult, where: str, own: Order = order) -> Resampled:
                return _stream_aurc(result, where, own)

            def reference(result: CellResult, where: str) -> Resampled:
                return _stream_aurc(result, where, "entropy")

            row = _compared(results, method, pairs, measured, reference, larger=False)
            risk = stream_risk(results, method, order)
            table.rows.append(
                [method, order, len(pairs), *row, *(float(risk[round(c * (len(risk) - 1))]) for c in _COVERAGES)]
            )
    return table


_COVERAGES = (0.5, 0.8, 0.9)


_NEEDS: dict[Order, str] = {"entropy": "entropy", "MI": "MI", "W": "W", "two reasons": "distance"}
"""The score that each order needs."""


def orders_of(results: Results, method: str) -> list[Order]:
    """The orders in which a method's answers can be given."""
    return [order for order, score in _NEEDS.items() if pairs_of(results, method, score)]


def stream_risk(results: Results, method: str, order: Order, steps: int = 200) -> Tensor:
    """``[steps + 1]``: risk at equally spaced coverages from 0 to 1, mean over pairs and seeds; 0 at coverage 0."""
    pairs = pairs_of(results, method, _NEEDS[order])
    risks = [_risk(r, w, order, steps) for t, w in pairs for r in results.seeds(t, method)]
    return torch.stack(risks).mean(0)


def _compared(
    results: Results,
    method: str,
    pairs: Sequence[Pair],
    measured: Callable[[CellResult, str], Resampled],
    reference: Callable[[CellResult, str], Resampled],
    larger: bool,
) -> list[Value]:
    """Mean over pairs with its interval, difference to the full ensemble's, the same with tasks drawn, pairs won."""
    own, ours, tasks = [], [], []
    for task, where in pairs:
        done = results.seeds(task, method)
        own.append(_over([measured(r, where) for r in done]))
        mine, other = shared_seeds(done, results.seeds(task, full_ensemble(results.suite)))
        if mine:
            ours.append(_over([measured(r, where) for r in mine], [reference(r, where) for r in other]))
            tasks.append(task)
    value = interval_of(sum(e for e, _ in own) / len(own), torch.stack([v for _, v in own]).mean(0))
    estimates, values = [e for e, _ in ours], torch.stack([v for _, v in ours]) if ours else torch.zeros(0)
    if not values.any():  # nothing to compare with, or itself
        return [value, None, None, None]
    mean, better = sum(estimates) / len(ours), sum((e > 0) == larger and e != 0 for e in estimates)
    drawn = interval_of(mean, over_groups(values, tasks)) if len(set(tasks)) > 1 else None
    return [value, interval_of(mean, values.mean(0)), drawn, f"{better} of {len(ours)}"]


def _over(found: Sequence[Resampled], minus: Sequence[Resampled] | None = None) -> tuple[float, Tensor]:
    """Mean over seeds, or mean difference, and the same over resamples of seeds and rows."""
    estimates = torch.tensor([e for e, _ in found], dtype=torch.float64)
    values = torch.stack([v for _, v in found])
    if minus is not None:
        estimates = estimates - torch.tensor([e for e, _ in minus], dtype=torch.float64)
        values = values - torch.stack([v for _, v in minus])
    return estimates.mean().item(), over_seeds(values)


def _stream_aurc(result: CellResult, where: str, order: Order) -> Resampled:
    """Area under risk and coverage, and over resamples: of the test rows, and of so many foreign ones as belong."""
    key = (where, order, "stream")
    if key not in result.resampled:
        scores, errors, rows = _streamed(result, where, order)
        first = counts_of(result.cell.task, "test", rows)[:_RESAMPLES]
        others = len(scores) - rows
        size = _foreign_rows(rows, others)
        drawn = _drawn(result.cell.task, where, others, size, len(first))
        values = resampled_aurc(scores, errors, torch.cat([first, drawn], dim=1))
        fixed = _risk(result, where, order, rows + size)[1:].mean().item()
        result.resampled[key] = fixed, values
    return result.resampled[key]


def _streamed(result: CellResult, where: str, order: Order) -> tuple[Tensor, Tensor, int]:
    """Score and error of each test row and each foreign row, and the number of test rows."""
    sets = result.predictions.sets
    test, other = sets["test"], sets[where]
    name = {"MI": "mutual_information", "W": "within_points"}.get(order, "entropy")
    scores = torch.cat([getattr(test, name), getattr(other, name)])
    if order == "two reasons":
        known = sets["validation"].distance
        assert known is not None and test.distance is not None and other.distance is not None
        far = p_values(torch.cat([test.distance, other.distance]), known.sort().values) < ALPHA
        scores = scores + far * (scores.max() + 1)
    wrong = ~test.correct(result.predictions.labels["test"])
    return scores, torch.cat([wrong, torch.ones(len(other)).bool()]), len(test)


def _risk(result: CellResult, where: str, order: Order, steps: int) -> Tensor:
    """``[steps + 1]``: risk at equally spaced coverages, mean over streams of all test rows and some foreign ones."""
    scores, errors, rows = _streamed(result, where, order)
    size = rows + _foreign_rows(rows, len(scores) - rows)
    place = (torch.arange(1, steps + 1) * size / steps).round().long().clamp_min(1) - 1
    found = [
        metrics.risk_coverage_curve(scores[chosen], errors[chosen])[1][place]
        for other in _subsets(result.cell.task, where, len(scores) - rows, size - rows)
        for chosen in [torch.cat([torch.arange(rows), rows + other])]
    ]
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.stack(found).mean(0)])


def _foreign_rows(rows: int, there: int) -> int:
    return min(there, max(1, round(rows * SHARE / (1 - SHARE))))


@lru_cache(maxsize=8)
def _drawn(task: str, where: str, rows: int, size: int, resamples: int) -> Tensor:
    """``[R, rows]``: how often each of a set's rows is among `size` that are drawn with replacement."""
    draw = torch.Generator().manual_seed(seed_of(task, where))
    chosen = torch.randint(rows, (resamples, size), generator=draw)
    return torch.zeros(resamples, rows, dtype=torch.float64).scatter_add_(1, chosen, torch.ones(chosen.shape).double())


@lru_cache(maxsize=8)
def _subsets(task: str, where: str, rows: int, size: int) -> list[Tensor]:
    """Numbers of `size` of a set's rows, or of all where there are fewer, drawn without replacement."""
    draw = torch.Generator().manual_seed(seed_of(task, f"stream of {where}"))
    return [torch.randperm(rows, generator=draw)[:size] for _ in range(_STREAMS)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
