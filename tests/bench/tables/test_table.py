"""A table in its three forms."""

from __future__ import annotations

from loracurve.bench.tables.table import Table, shown
from loracurve.inference.intervals import Interval


def test_a_table_in_three_forms() -> None:
    table = Table("x", "Title", ["method", "NLL", "n", "p"], notes="Note.")
    table.rows = [["a_b", Interval(0.25, 0.2, 0.3), 3, None], ["c", None, 10, 0.5]]
    assert table.markdown() == (
        "## Title\n\nNote.\n\n| method | NLL | n | p |\n|---|---:|---:|---:|\n"
        "| a_b | 0.2500 [0.2000, 0.3000] | 3 | - |\n| c | - | 10 | 0.5000 |\n"
    )
    assert table.csv() == "method,NLL,NLL low,NLL high,n,p\na_b,0.25,0.2,0.3,3,\nc,,,,10,0.5\n"
    assert r"a\_b & 0.2500 [0.2000, 0.3000] & 3 & - \\" in table.latex()
    assert r"\begin{tabular}{lrrr}" in table.latex()


def test_pages_have_three_digits_where_quoted_tables_have_four() -> None:
    assert shown(0.25) == "0.250" and shown(52.2032, 2) == "52.20" and shown(None) == "-" and shown(3) == "3"
    assert shown(Interval(0.25, 0.2, 0.3)) == "0.250 [0.200, 0.300]"
    assert shown(Interval(-0.0044, -0.0046, -0.0042)) == "-0.00440 [-0.00460, -0.00420]"
    table = Table("x", "Title", ["p"], [[-0.00001]])
    assert table.markdown().endswith("| -0.0000 |\n"), "its sign says on which side of 0 it lies"
