"""What the sections of a run's report say, from made numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from loracurve.report.run_data import RunData
from loracurve.report.sections import examples, methods_of

# Five rows that are certain, and below the median; of the others the parts of the entropy 1.
PARTS = [(0.5, 0.3, 0.2), (0.55, 0.05, 0.4), (0.8, 0.15, 0.05), (0.97, 0.02, 0.01), (0.95, 0.02, 0.03)]


def run_of(parts: list[tuple[float, ...]]) -> RunData:
    rows = [(0.01, 0.001, 0.008, 0.001)] * 5 + [(1.0, *p) for p in parts]
    names = ["entropy", "expected_entropy", "within_points", "between_points"]
    table = pd.DataFrame(rows, columns=names).assign(method="curve", set="test", probs=[[0.9, 0.1]] * len(rows))
    table["mutual_information"] = table["within_points"] + table["between_points"]
    table["id"] = [str(i - 5) for i in range(len(rows))]
    return RunData("run", Path(), {"task": {"classes": ["a", "b"]}}, {"task": {}}, {}, table, None, {})


def listed(run: RunData) -> dict[str, list[str]]:
    """Ids of the lists by how their captions begin."""
    return {
        sheet.caption.split(":")[0]: [row[0].removeprefix("id ") for row in sheet.rows]
        for sheet in examples(run).sheets
    }


def test_examples_are_rows_of_which_a_part_is_a_tenth() -> None:
    found = listed(run_of(PARTS))
    assert found == {
        "The points disagree": ["1", "0"],
        "Far from the training data": ["0", "2"],
        "The text is ambiguous and the points agree on it": ["3", "4", "2"],
    }


def test_negligible_parts_have_no_list() -> None:
    run = run_of([(0.97, 0.02, 0.01)] * 5)
    assert list(listed(run)) == ["The text is ambiguous and the points agree on it"]
    assert (
        "No row has 10 % of its entropy or more between points or within points: no list of these."
        in examples(run).notes
    )


@pytest.mark.parametrize("known", [True, False])
def test_the_adapter_that_validation_chooses_is_named(known: bool) -> None:
    def method(nll: float, validation: float) -> dict[str, Any]:
        tempered = {"tempered": {"validation_nll": validation}} if known else {}
        return {"passes": 1, "sets": {"test": {"examples": 9, "nll": nll}}, "detection": {}, **tempered}

    methods = {"adapter 0": method(0.1, 0.4), "adapter 1": method(0.2, 0.3), "curve": method(0.1, 0.2)}
    (sheet,) = methods_of(RunData("run", Path(), {"methods": methods}, {}, {}, None, None, {})).sheets
    assert [row[0] for row in sheet.rows] == [
        "adapter 0",
        "adapter 1 (best on validation)" if known else "adapter 1",
        "curve",
    ]
