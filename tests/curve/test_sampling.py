from __future__ import annotations

import math

import pytest
import torch

from loracurve.curve import bezier
from loracurve.curve.config import check_sampling
from loracurve.curve.sampling import sample_points
from loracurve.system.errors import UserError
from loracurve.system.randomness import generator

WAYS = ["stratified", "uniform", "arc-length", "half-period"]
# A line of even speed, on which arc length is t.
LINE = {"gram": bezier.gram([torch.tensor([[0.0], [1.0]])])}


def kolmogorov_distance(sample):
    """Largest distance between the empirical distribution and the uniform one."""
    ordered = sample.flatten().sort().values
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return torch.maximum((steps[1:] - ordered).abs(), (ordered - steps[:-1]).abs()).max().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [(2,), (4, 3)])
def test_each_point_is_uniform(way, count):
    options, steps = (LINE, 100) if way == "arc-length" else ({}, 2000)
    draws = torch.stack([sample_points(count, way, generator(0, "step", s), **options) for s in range(steps)])
    assert draws.shape == (steps, *count) and draws.dtype == torch.float64
    assert draws.min() >= 0 and draws.max() <= 1
    # All points of a draw together: not independent, but never worse spread than independent ones. The bound is
    # exceeded by as many independent numbers as there are steps with probability 0.001 (Massart 1990).
    bound = math.sqrt(math.log(2 / 0.001) / (2 * steps))
    assert kolmogorov_distance(draws) < bound
    if way == "uniform":
        for point in draws.flatten(1).T:
            assert kolmogorov_distance(point) < bound


@pytest.mark.parametrize("way", ["stratified", "half-period", "arc-length"])
@pytest.mark.parametrize("count", [(6,), (2, 5), (4, 3, 2)])
def test_strata_are_hit_once_in_reading_order(way, count):
    total = math.prod(count)
    for step in range(20):
        t = sample_points(count, way, generator(1, step), **(LINE if way == "arc-length" else {}))
        if way == "arc-length":
            t = t - 1e-12  # the inverse of the length is exact to rounding only
        assert (t.flatten() * total).floor().tolist() == list(range(total))


def test_the_draws_of_stratified_points_stay_what_they_were():
    u = torch.rand(6, generator=generator(3), dtype=torch.float64)
    expected = ((torch.arange(6) + u) / 6).view(2, 3)
    assert torch.equal(sample_points((2, 3), "stratified", generator(3)), expected)
    assert torch.equal(sample_points((6,), "uniform", generator(3)), u)


@pytest.mark.parametrize("count", [(2,), (4,), (4, 7)])
def test_half_period_pairs_are_half_apart(count):
    t = sample_points(count, "half-period", generator(2))
    first, second = t.chunk(2)
    assert torch.equal(second, first + 0.5)
    assert (first < 0.5).all()


def test_arc_length_points_are_even_in_length():
    control = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.2, 0.1], [2.0, 1.0], [5.0, 1.0]], dtype=torch.float64)
    gram = bezier.gram([control])
    t = sample_points((200,), "arc-length", generator(4), gram=gram, segments=2, degree=2)
    whole = bezier.arc_length(gram, 2, 2)
    fractions = torch.stack([bezier.arc_length(gram, 2, 2, 0.0, at) / whole for at in t.tolist()])
    assert ((fractions + 1e-9) * 200).floor().tolist() == list(range(200))
    assert kolmogorov_distance(t) > 0.2, "uneven speed: even in length is uneven in t"


@pytest.mark.parametrize("way", WAYS)
def test_a_draw_is_a_function_of_its_generator(way):
    options = LINE if way == "arc-length" else {}
    first, again, other = (sample_points((4,), way, generator(s, "t"), **options) for s in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_refusals():
    with pytest.raises(UserError, match="did you mean 'stratified'"):
        check_sampling("stratifed", 2)
    with pytest.raises(UserError, match="even number"):
        sample_points((3, 2), "half-period", generator(0))
    with pytest.raises(ValueError, match="Gram"):
        sample_points((2,), "arc-length", generator(0))
