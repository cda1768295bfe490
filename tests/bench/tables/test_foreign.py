"""Foreign rows and the stream that has some."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.single import Single
from loracurve.bench.results import CellResult, Results
from loracurve.bench.store import Predictions
from loracurve.bench.suite import Cell
from loracurve.bench.tables.foreign import ALPHA, SHARE, foreign, orders_of, stream, stream_risk, text_length
from loracurve.bench.tables.resampled import over_groups, over_seeds, scores_of
from loracurve.inference import metrics
from loracurve.inference.intervals import Interval
from loracurve.inference.predictive import Predictive


def _predictive(chance: Tensor, distance: Tensor | None = None, points: int = 1) -> Predictive:
    """Of two classes, the first with these probabilities; of several points the middle one has them."""
    shifts = torch.linspace(-0.05, 0.05, points) if points > 1 else torch.zeros(1)
    p = (chance + shifts[:, None]).clamp(0.01, 0.99)
    return replace(Predictive.from_log_probs(torch.stack([p, 1 - p], -1).log()), distance=distance)


def _results(seeds: int = 2, tasks: tuple[str, ...] = ("a", "b")) -> Results:
    """`ensemble 2` is as sure of foreign rows as of the task's; `far` has a distance that tells all of them apart."""
    methods = {"ensemble 2": Ensemble(2), "far": Single()}
    suite = SimpleNamespace(tasks=dict.fromkeys(tasks), seeds=list(range(seeds)), methods=methods, anchors=2)
    done = {}
    for task in tasks:
        for seed in range(seeds):
            draw = torch.Generator().manual_seed(10 * seed + len(task))
            sizes = {"validation": 200, "test": 180, "ood:x": 60}
            chance = {n: 0.02 + 0.96 * torch.rand(e, generator=draw) for n, e in sizes.items()}
            labels = {n: (torch.rand(e, generator=draw) > chance[n]).long() for n, e in sizes.items() if n != "ood:x"}
            near = {n: torch.rand(e, generator=draw) + (2 if n == "ood:x" else 0) for n, e in sizes.items()}
            tokens = {n: torch.full((e,), 7 if n == "ood:x" else 9) for n, e in sizes.items()}
            for method in methods:
                sets = {
                    n: _predictive(p, None, 2) if method == "ensemble 2" else _predictive(p, near[n])
                    for n, p in chance.items()
                }
                cell = Cell(task, seed, method)
                done[cell] = CellResult(cell, {}, Predictions(sets, labels, {}, tokens))
    return Results(suite, done, {}, [])  # type: ignore[arg-type]


def test_scores_and_orders_that_there_are() -> None:
    results = _results()
    assert scores_of(results.seeds("a", "ensemble 2")[0].test) == ["MI", "entropy"]
    assert scores_of(results.seeds("a", "far")[0].test) == ["entropy", "distance"]
    assert orders_of(results, "far") == ["entropy", "two reasons"] and orders_of(results, "ensemble 2") == [
        "entropy",
        "MI",
    ]


def test_means_over_pairs_and_what_text_length_would_do() -> None:
    results = _results()
    table = foreign(results)
    rows = {(r[0], r[1]): r for r in table.rows}
    expected = []
    for task in ("a", "b"):
        for r in results.seeds(task, "far"):
            scores = torch.cat([r.test.entropy, r.predictions.sets["ood:x"].entropy])
            expected.append(metrics.auroc(scores, torch.arange(240) >= 180).value)
    found = rows["far", "entropy"][3]
    assert isinstance(found, Interval) and found.estimate == pytest.approx(sum(expected) / 4)  # type: ignore[arg-type]
    perfect = rows["far", "distance"]
    assert perfect[2] == 2 and perfect[3] == Interval(1, 1, 1) and perfect[6:] == ["2 of 2", 1.0, 0.0]
    # The difference to the ensemble by entropy is the one of the means.
    own = rows["ensemble 2", "entropy"][3]
    assert isinstance(perfect[4], Interval) and isinstance(own, Interval)
    assert perfect[4].estimate == pytest.approx(1 - own.estimate)
    assert rows["ensemble 2", "entropy"][4:7] == [None] * 3
    assert text_length(results) == {("a", "ood:x"): 1.0, ("b", "ood:x"): 1.0}
    assert table.rows[-1][0] == "the prompt's length" and table.rows[-1][3] == 1.0


def test_a_stream_ranks_far_rows_last() -> None:
    results = _results()
    rows = {(r[0], r[1]): r for r in stream(results).rows}
    # 180 test rows and 20 foreign ones, every one far: the first answers are the test rows by entropy, but for those
    # whose own p-value is below ALPHA.
    found = []
    for task in ("a", "b"):
        for r in results.seeds(task, "far"):
            known, test = r.predictions.sets["validation"].distance, r.test.distance
            assert known is not None and test is not None
            p = (1 + (known[None] >= test[:, None]).sum(1)) / (len(known) + 1)
            wrong = ~r.test.correct(r.predictions.labels["test"])
            near = p >= ALPHA
            order = torch.cat([r.test.entropy[near].argsort()])
            errors = wrong[near][order].double()
            risk = errors.cumsum(0) / torch.arange(1, len(errors) + 1)
            found.append((len(errors), risk))
    coverage, size = 0.8, round(180 / (1 - SHARE))
    at = int(size * coverage)
    expected = sum(risk[at - 1].item() for _, risk in found) / 4
    assert all(count >= at for count, _ in found)
    assert rows["far", "two reasons"][8] == pytest.approx(expected)
    assert stream_risk(results, "far", "two reasons")[-1] == pytest.approx(
        sum(
            (~r.test.correct(r.predictions.labels["test"])).sum().item() + 20
            for t in "ab"
            for r in results.seeds(t, "far")
        )
        / (4 * 200)
    )
    gain = rows["far", "two reasons"][4]
    assert isinstance(gain, Interval) and gain.high < 0 and rows["far", "two reasons"][6] == "2 of 2"
    area, low, high = rows["far", "two reasons"][3]  # type: ignore[misc]
    assert low < area < high


def test_seeds_and_tasks_are_drawn_as_wholes() -> None:
    values = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, 4000)
    means = over_seeds(values)
    assert set(means.tolist()) == {0.0, 0.5, 1.0} and means.mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(over_seeds(values[:1]), values[0])
    pairs = torch.tensor([[0.0], [0.0], [3.0]], dtype=torch.float64).expand(3, 4000)
    drawn = over_groups(pairs, ["a", "a", "b"])
    # Both tasks, in three pairs; one of them alone, or the other.
    assert {round(v, 9) for v in drawn.tolist()} == {0.0, 1.0, 3.0}
    assert math.isclose((drawn == 1).double().mean().item(), 0.5, abs_tol=0.03)


def test_a_score_that_a_task_lacks_counts_where_it_is() -> None:
    results = _results()
    for cell in [c for c in results.done if c.task == "b" and c.method == "far"]:
        of = results.done[cell].predictions
        for name, predictive in of.sets.items():
            of.sets[name] = replace(predictive, distance=None)
    rows = {(r[0], r[1]): r for r in foreign(results).rows}
    assert rows["far", "entropy"][2] == 2 and rows["far", "distance"][2] == 1
    assert rows["far", "distance"][5] is None, "one task says nothing of the choice of tasks"
    assert {(r[0], r[1]): r[2] for r in stream(results).rows}["far", "two reasons"] == 1
