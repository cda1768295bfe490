"""Invariance of the public face, by properties: what predictions do not depend on."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.alone import CASES, LABELS, POINTS, TEXTS, Case, log_probs_of, make_case, parts_of, write_data
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import loracurve as lc
from loracurve.inference.metrics import classification_summary
from loracurve.inference.predictive import Predictive
from loracurve.tasks.batching import evaluation_batches
from loracurve.tasks.encoding import Encoded

# An example that fails is small already: making it smaller would run models for minutes.
FEW = settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
MEASURES = ("acc", "nll", "brier", "ece", "entropy", "expected_entropy", "mutual_information", "disagreement")

numbers_of_rows = st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=14)
orders_of_classes = st.permutations(range(len(LABELS)))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Each case, made once."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = make_case(name, tmp_path_factory.mktemp("data"))
        return made[name]

    return case


every_case = pytest.mark.parametrize("name", list(CASES))


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def of_average(p: Predictive) -> dict[str, Tensor]:
    """What an average of points says of each row."""
    names = ("confidence", "entropy", "expected_entropy", "mutual_information", "disagreement")
    found = {name: getattr(p, name) for name in names}
    return found | ({"nll": p.negative_log_likelihood()} if p.point_log_probs is None else {"probs": p.probs})


# What a prediction does not depend on: company, order, batches, rows that are shared, padding, way, processes.


@every_case
@FEW
@given(
    numbers=numbers_of_rows,
    tokens=st.sampled_from([1, 40, 150, 4096]),
    row_tokens=st.sampled_from([1, 24, 70, 256]),
    packing=st.booleans(),
    pad_to=st.sampled_from([1, 8]),
    together=st.sampled_from([1, 130, None]),
)
def test_a_row_is_predicted_alike_in_any_company(
    cases: Callable[[str], Case], name: str, numbers: list[int], tokens: int, row_tokens: int, packing: bool,
    pad_to: int, together: int | None,
) -> None:  # fmt: skip
    case = cases(name)
    encoded = case.encode(numbers)
    packing &= case.model.runner.takes_trees(encoded, row_tokens)
    batches = [*evaluation_batches(encoded, tokens, row_tokens, packing, pad_to)]
    case.check(parts_of(log_probs_of(case.model, batches, POINTS, together), encoded), numbers)
    predictive = lc.predict(case.model, batches, POINTS, summarise=name == "lm")
    case.check(parts_of(predictive, encoded), numbers)


@every_case
@FEW
@given(numbers=numbers_of_rows, way=st.sampled_from(["auto", "points", "merged"]), points=st.permutations(range(3)))
def test_a_split_is_predicted_alike_in_every_way(
    cases: Callable[[str], Case], name: str, numbers: list[int], way: Any, points: list[int]
) -> None:
    case = cases(name)
    encoded = case.encode(numbers)
    found = lc.predict_split(case.model, encoded, POINTS[points], way=way)
    back = torch.tensor(points).argsort()
    case.check([part[back] for part in parts_of(found, encoded)], numbers)
    # Copies of a row differ in nothing that is reported.
    copies = {n: [i for i, other in enumerate(numbers) if other == n] for n in numbers}
    for places in copies.values() if name != "lm" else ():
        for values in of_average(found).values():
            close(values[places], values[places[:1]].expand_as(values[places]), 1e-6)


@pytest.mark.parametrize("name", ["letter", "text", "lm", "head", "decoder head"])
def test_the_padding_of_the_tokenizer_changes_nothing(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    every = [*range(len(case.rows)), 3, 0]
    for side in ("left", "right"):
        for pad in (case.task.tokenizer.eos_token, case.task.tokenizer.convert_ids_to_tokens(40), None):
            tokenizer = copy.deepcopy(case.task.tokenizer)
            tokenizer.padding_side, tokenizer.pad_token = side, pad
            task = case.with_tokenizer(tokenizer)
            encoded = task.encode_rows([case.rows[n] for n in every])
            case.check(parts_of(lc.predict_split(case.model, encoded, POINTS), encoded), every)


def test_padding_that_stands_in_a_text_is_read(cases: Callable[[str], Case]) -> None:
    """A text that ends in the padding token, alone and beside longer ones."""
    case = cases("decoder head")
    pad = case.task.tokenizer.pad_token
    rows = [replace(case.rows[n], text=f"{case.rows[n].text}{end}") for n, end in ((3, pad), (5, ""), (7, pad * 2))]
    whole = case.task.encode_rows(rows)
    found = lc.predict_split(case.model, whole, POINTS)
    for number, row in enumerate(rows):
        alone = lc.predict_split(case.model, case.task.encode_rows([row]), POINTS)
        close(found.index(torch.tensor([number])).probs, alone.probs)


def as_json(case: Case, number: int, name: str) -> dict[str, Any]:
    row = case.rows[number]
    fields = ("text", "text2", "question", "choices")
    return {"id": name, **{f: value for f in fields if (value := getattr(row, f))}}


# Other names and other orders of the same data.


def turned_head(case: Case, order: list[int]) -> lc.CurveModel:
    """The same classifier with its classes in another order."""
    model = copy.deepcopy(case.model)
    points = {
        name: p[:, order] if ".classifier." in name or ".score." in name else p
        for name, p in model.control_points().items()
    }
    model.set_curve(model.spec, points)
    return model


def summary(found: Predictive, encoded: Encoded) -> dict[str, float]:
    values = classification_summary(found, encoded.labels)
    return {name: values[name] for name in MEASURES}


@pytest.mark.parametrize("form", ["label", "answers", "text", "text answers", "head", "decoder head"])
@FEW
@given(order=orders_of_classes, rows=st.permutations(range(len(TEXTS))))
def test_relabelled_data_give_relabelled_predictions_and_equal_metrics(
    cases: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory, form: str, order: list[int], rows: list[int]
) -> None:
    scoring = form.split()[-1] if "head" in form else form.split()[0].replace("answers", "label")
    case = cases({"label": "label", "text": "text"}.get(scoring, form))
    found = {}
    for name, labels in (("own", LABELS), ("turned", [LABELS[c] for c in order])):
        words = {"red": "yes", "green": "World", "blue": "no"}
        own: dict[str, Any] = {}
        if "answers" in form:
            own = {"prompt": "Text: {text}\nLabel:", "answers": [words[label] for label in labels]}
        # A multiple-choice model may score classes by text too: it is the same language model.
        data = write_classes(tmp_path_factory.mktemp(name), labels, rows if name == "turned" else range(len(TEXTS)))
        options = lc.TaskConfig(data=str(data), scoring=scoring, **own)  # type: ignore[arg-type]
        encoded = lc.load_task(options, case.task.tokenizer, 512).encode("test")
        model = turned_head(case, order) if "head" in form and name == "turned" else case.model
        found[name] = lc.predict_split(model, encoded, POINTS), encoded
    own_rows, turned = found["own"][0], found["turned"][0].index(torch.tensor(rows).argsort())
    close(turned.probs, own_rows.probs[:, order])
    assert turned.point_log_probs is not None and own_rows.point_log_probs is not None
    close(turned.point_log_probs, own_rows.point_log_probs[..., order])
    assert torch.equal(torch.tensor(order)[turned.prediction], own_rows.prediction)
    assert summary(*found["turned"]) == pytest.approx(summary(*found["own"]), abs=1e-5)


def write_classes(folder: Path, labels: Sequence[str], order: Sequence[int]) -> Path:
    """The texts with labels by name, in an order of rows, under other ids."""
    data = write_data(folder / "data", "label", labels)
    lines = (data / "test.jsonl").read_text().splitlines()
    rows = [json.loads(lines[number]) | {"id": f"{folder.name}-{place}"} for place, number in enumerate(order)]
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.mark.parametrize("normalise", ["sum", "mean"])
@FEW
@given(numbers=numbers_of_rows, seed=st.integers(0, 99))
def test_choices_in_another_order_are_scored_alike(
    cases: Callable[[str], Case], normalise: Any, numbers: list[int], seed: int
) -> None:
    case = cases("text")
    task = lc.load_task(replace(case.options, normalise=normalise), case.task.tokenizer, 512)
    rows = [case.rows[n] for n in numbers]
    orders = [random.Random(seed + i).sample(range(len(row.choices)), len(row.choices)) for i, row in enumerate(rows)]
    turned = [
        replace(row, choices=tuple(row.choices[c] for c in order), label=order.index(row.label or 0))
        for row, order in zip(rows, orders, strict=True)
    ]
    one, other = task.encode_rows(rows), task.encode_rows(turned)
    mine, found = (lc.predict_split(case.model, encoded, POINTS) for encoded in (one, other))
    for i, order in enumerate(orders):
        close(found.probs[i, : len(order)], mine.probs[i, order])
    assert summary(found, other) == pytest.approx(summary(mine, one), abs=1e-5)
