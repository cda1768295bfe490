"""Validation and test rows where there are none."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from loracurve.tasks.splitting import divide

PARTS = ("train", "validation", "test")


def test_a_tenth_of_each_class_goes_to_validation_and_to_test() -> None:
    labels: list[int | None] = [0] * 200 + [1] * 50
    found = divide([str(i) for i in range(250)], labels)
    assert {n: len(rows) for n, rows in found.items()} == {"train": 200, "validation": 25, "test": 25}
    assert sorted(i for rows in found.values() for i in rows) == list(range(250))
    assert {n: Counter(labels[i] for i in found[n]) for n in PARTS} == {
        "train": {0: 160, 1: 40},
        "validation": {0: 20, 1: 5},
        "test": {0: 20, 1: 5},
    }


def test_the_order_of_the_rows_changes_nothing_and_the_seed_does() -> None:
    rows: list[tuple[str, int | None, str | None]] = [(f"text {i % 110}", i % 3, f"g{i % 60}") for i in range(120)]

    def found(order: list[int], seed: int = 0) -> dict[str, set[int]]:
        keys, labels, groups = zip(*(rows[i] for i in order), strict=True)
        return {n: {order[i] for i in r} for n, r in divide(keys, labels, groups, seed=seed).items()}

    order = list(range(len(rows)))
    shuffled = order.copy()
    Random(0).shuffle(shuffled)
    assert found(shuffled) == found(order)
    assert found(order, 1) != found(order)


def test_rows_joined_by_text_or_group_stay_together() -> None:
    # a-b share a text, b-c a group, c-d a text: one unit, beside nine alone.
    keys = ["x", "x", "y", "y", *map(str, range(9))]
    groups = [None, "g", "g", None, *[None] * 9]
    for seed in range(20):
        found = divide(keys, [0] * 13, groups, seed=seed)
        assert sum(bool(set(rows) & {0, 1, 2, 3}) for rows in found.values()) == 1
        assert all(found.values())


def test_two_units_of_a_class_are_trained_and_three_are_in_all_parts() -> None:
    keys = [f"a{i}" for i in range(40)] + ["b0", "b1"] + ["c0", "c1", "c2"]
    labels: list[int | None] = [0] * 40 + [1] * 2 + [2] * 3
    found = divide(keys, labels)
    assert {n: Counter(labels[i] for i in found[n])[1] for n in PARTS} == {"train": 2, "validation": 0, "test": 0}
    assert {n: Counter(labels[i] for i in found[n])[2] for n in PARTS} == {"train": 1, "validation": 1, "test": 1}


def test_a_class_that_leads_in_no_group_is_in_all_parts() -> None:
    """Thirty people wrote mostly class 0; five of them have one row of class 1."""
    groups, labels = [], list[int | None]()
    for person in range(30):
        groups += [person] * 6
        labels += [0] * 5 + [int(person < 5)]
    keys = [str(i) for i in range(len(labels))]
    for seed in range(10):
        found = divide(keys, labels, groups, seed=seed)
        assert all(1 in {labels[i] for i in found[n]} for n in PARTS)
        people = [{groups[i] for i in found[n]} for n in PARTS]
        assert sum(map(len, people)) == 30


def test_a_group_of_half_of_the_rows_is_trained() -> None:
    groups = ["big"] * 50 + [f"g{i}" for i in range(50)]
    for seed in range(10):
        found = divide([str(i) for i in range(100)], [0] * 100, groups, seed=seed)
        assert {n: len(found[n]) for n in PARTS} == {"train": 80, "validation": 10, "test": 10}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 3), st.one_of(st.none(), st.integers(0, 5))),
        min_size=1,
        max_size=40,
    )
)
def test_parts_hold_each_row_once_and_share_no_text_and_no_group(rows: list[tuple[int, int, int | None]]) -> None:
    keys, labels, groups = [str(r[0]) for r in rows], [r[1] for r in rows], [r[2] for r in rows]
    found = divide(keys, labels, groups)
    assert sorted(i for part in found.values() for i in part) == list(range(len(rows)))
    for a in PARTS:
        for b in PARTS:
            if a < b:
                assert not {keys[i] for i in found[a]} & {keys[i] for i in found[b]}
                assert not {groups[i] for i in found[a]} & {groups[i] for i in found[b]} - {None}
