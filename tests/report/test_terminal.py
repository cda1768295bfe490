"""What the terminal says of a run."""

from __future__ import annotations

from typing import Any

import pytest

from loracurve.report.terminal import print_report


def _method(**changes: Any) -> dict[str, Any]:
    figures = {"acc": 0.9, "nll": 0.3, "ece": 0.02, "entropy": 0.5, "expected_entropy": 0.3, "mutual_information": 0.2}
    figures |= {"within_points": 0.15, "between_points": 0.05, "examples": 40}
    found = {"auroc_entropy": 0.6, "auroc_mi": 0.7, "auroc_within": 0.8125, "auroc_distance": 0.9}
    return {"passes": 5, "sets": {"test": figures}, "detection": {"foreign": found, "far": found}} | changes


def test_a_line_for_each_set_and_method_under_the_names_of_the_scores(capsys: pytest.CaptureFixture[str]) -> None:
    print_report({"methods": {"curve": _method()}, "comparisons": []})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["far:", "curve", "0.600", "0.700", "0.812", "0.900"] in lines
    assert ["foreign:", "curve", "0.600", "0.700", "0.812", "0.900"] in lines
    assert ["curve:", "test", "0.500", "0.300", "0.150", "0.050"] in lines
    assert not any("minus" in line for line in lines), "there is nothing to compare with"


def test_differences_say_which_is_better(capsys: pytest.CaptureFixture[str]) -> None:
    lower = {"estimate": -0.2, "low": -0.3, "high": -0.1, "distinguishable": True}
    unsure = {"estimate": 0.01, "low": -0.02, "high": 0.04, "distinguishable": False}
    comparison = {"second": "adapter 0", "nll": lower, "acc": unsure}
    print_report({"methods": {"curve": _method(detection={})}, "comparisons": [comparison]})
    printed = capsys.readouterr().out
    assert "curve better" in printed and "not distinguishable" in printed and "AUROC" not in printed


def test_one_point_has_no_information_and_the_base_model_stands_in_the_tables(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = _method()["sets"]["test"] | {"within_points": 0.0, "mutual_information": 0.0}
    base = {"passes": 1, "sets": {"test": figures}, "detection": {"far": {"auroc_entropy": 0.5, "auroc_mi": 0.5}}}
    lower = {"estimate": -0.2, "low": -0.2004, "high": -0.1996, "distinguishable": True}
    comparison = {"second": "base model", "nll": lower, "acc": lower}
    print_report({"methods": {"base model": base, "curve": _method()}, "comparisons": [comparison]})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["base", "model", "1", "0.900", "0.300", "0.020", "-"] in lines
    assert ["far:", "base", "model", "0.500", "-", "-", "-"] in lines
    assert ["base", "model", "NLL", "-0.2000", "[-0.2004,", "-0.1996]", "curve", "better"] in lines
